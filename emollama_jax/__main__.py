"""`python -m emollama_jax` is the command `emollama`."""

import sys

from emollama_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
