"""The emotions that each data set knows, in the order in which its question lists them."""

MERR = ("happy", "sad", "neutral", "angry", "worried", "surprise", "fear", "contempt", "doubt")
MER2023 = MERR[:6]  # and MER2024
DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
