export EMOLLAMA_HEARTBEAT=gs://mine/jobs/stage1/state/heartbeat.json
export JAX_COMPILATION_CACHE_DIR=gs://mine/compiled
export JAX_TRACEBACK_FILTERING=off
emollama doctor --config /opt/emollama/job/stage1_v5e_16.py --config.train.workdir=gs://mine/runs/stage1 || exit
exec emollama train --config /opt/emollama/job/stage1_v5e_16.py --config.train.workdir=gs://mine/runs/stage1
