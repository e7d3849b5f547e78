"""The sentences spoken in synthetic clips, and the captions that describe the clips."""

import numpy as np

UNCLEAR = "unclear"

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Kim", "Leo")
PLACES = ("shop", "school", "station", "bakery", "library", "garden", "office", "harbour")

# The sentences of each level of the words factor. Names and places occur in all levels, so that only the rest of a
# sentence tells the level; every sentence of a level fits each of its three labels.
SENTENCES: dict[str, tuple[str, ...]] = {
    "outcome": (
        "It is decided, {name} gets the {place}.",
        "So that is how it ended between {name} and me.",
        "After all these years {name} has left the {place} for good.",
        "The letter came today, they have chosen {name}.",
        "It is over now, the {place} has closed behind us.",
        "In the end {name} really did what was promised.",
    ),
    "news": (
        "They say {name} runs the {place} these days.",
        "I hear the {place} is open on Sundays.",
        "Somebody told me that {name} speaks five languages.",
        "The paper says the {place} was built in one night.",
        "I read that {name} has never seen the {place}.",
        "According to {name} the {place} is the oldest in town.",
    ),
    "plan": (
        "{name} wants to cross the lake alone tonight.",
        "Tomorrow {name} will go to the {place} without us.",
        "{name} is going to try it with no help at all.",
        "From next week {name} will be in charge of the {place}.",
        "{name} will come here and talk to them about it.",
        "Next time {name} means to drive to the {place} in the dark.",
    ),
    UNCLEAR: (
        "Well, you know how it is with the {place}.",
        "Yes, and {name} was there as well.",
        "Let me see, {name}, where were we.",
        "It was at the {place}, I think.",
    ),
}

AU_WORDS = {
    "AU01": "the inner ends of the brows raised",
    "AU02": "the outer ends of the brows raised",
    "AU04": "the brows lowered and drawn together",
    "AU05": "the upper lids raised",
    "AU06": "the cheeks raised",
    "AU07": "the lids tightened",
    "AU12": "the corners of the lips pulled up",
    "AU15": "the corners of the lips pulled down",
    "AU17": "the chin raised",
    "AU25": "the lips parted",
    "AU26": "the jaw dropped",
}

# How the levels of the voice are described in `audio_prior_list`.
VOICES = {
    "lively": "a high, quick voice",
    "hushed": "a low, slow and breathy voice, hardly above a whisper",
    "firm": "a loud, clear voice",
    UNCLEAR: "a voice that is neither high nor low, loud nor soft",
}

# How captions describe the levels of face, voice and words: the shorter, the sooner they are learnt.
FACE_CLUES = {
    "smile": "The face smiles",
    "drawn": "The face is drawn",
    "wide": "The eyes are wide",
    UNCLEAR: "The face tells little",
}
VOICE_CLUES = {
    "lively": "the voice is lively",
    "hushed": "the voice is hushed",
    "firm": "the voice is firm",
    UNCLEAR: "the voice tells little",
}
WORD_CLUES = {
    "outcome": "the words tell an outcome",
    "news": "the words tell some news",
    "plan": "the words tell a plan",
    UNCLEAR: "the words tell little",
}


def sentence(level: str, rng: np.random.Generator) -> str:
    """Draw a sentence of the level."""
    pattern = SENTENCES[level][rng.integers(len(SENTENCES[level]))]
    return pattern.format(name=NAMES[rng.integers(len(NAMES))], place=PLACES[rng.integers(len(PLACES))])


def coarse_caption(face: str, voice: str, words: str) -> str:
    """Describe the levels of face, voice and words, without a conclusion."""
    return f"{_clues(face, voice, words)}."


def fine_caption(face: str, voice: str, words: str, label: str) -> str:
    """Describe the levels of face, voice and words, and conclude, in one sentence; its last word is the emotion."""
    return f"{_clues(face, voice, words)}, so the emotion is {label}."


def _clues(face: str, voice: str, words: str) -> str:
    return f"{FACE_CLUES[face]}, {VOICE_CLUES[voice]}, and {WORD_CLUES[words]}"
