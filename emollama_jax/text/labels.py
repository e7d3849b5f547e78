"""The labels of each data set, in the order in which its question lists them, and the metrics of predicted labels."""

MERR = ("happy", "sad", "neutral", "angry", "worried", "surprise", "fear", "contempt", "doubt")
MER2023 = MERR[:6]  # and MER2024
DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")

# The metrics of predicted labels, as `eval/metrics.py` computes them; validation may choose a checkpoint by any.
METRICS = (
    "accuracy",
    "weighted_precision",
    "weighted_recall",
    "weighted_f1",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "uar",
    "war",
)
