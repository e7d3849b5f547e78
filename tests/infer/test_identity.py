"""What a run says it learnt from, against what it is asked about."""

import dataclasses

import pytest
from flax import nnx

from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.features.encoders import Encoders
from emollama_jax.infer.identity import check_encoders, check_image_tokens, learnt_frame_rules
from emollama_jax.models.eva_vit import EvaVit
from tests.train.runs import write_meta


@pytest.mark.parametrize(
    ("known", "found", "all_known", "message"),
    [
        ({"mae": "a", "eva_vit": "e"}, {"mae": "a", "eva_vit": "e"}, True, None),
        ({"mae": "a", "eva_vit": "e"}, {"mae": "a"}, True, None),  # frames, whose encoder is not loaded yet
        ({"mae": "a"}, {}, False, None),
        ({"mae": "a"}, {}, True, r"mae features of a, and here they are of no encoder; give that encoder \(--mae\)"),
        ({"mae": "a"}, {"mae": "b"}, False, "mae features of a, and here they are of b"),
        (
            {"eva_vit": "e"},
            {"eva_vit": "f"},
            False,
            r"eva_vit features of e, .* of f; .* \(--eva-vit\), .*--any-enc",
        ),
        ({}, {"mae": "b", "eva_vit": "f"}, True, None),
    ],
)
def test_features_are_of_the_encoders_that_were_learnt(tmp_path, known, found, all_known, message):
    trained = write_meta(tmp_path, encoders=known)
    if message is None:
        return check_encoders(trained, found, all_known=all_known)
    with pytest.raises(UserError, match=message) as caught:
        check_encoders(trained, found, all_known=all_known)
    assert "\n" not in str(caught.value)


def test_the_encoder_of_frames_is_that_of_the_image_tokens(tmp_path):
    """By the fingerprint that extraction keeps."""
    config = load_config("tiny")
    eva_vit = EvaVit(dataclasses.replace(config.eva_vit, num_layers=1), rngs=nnx.Rngs(0))
    kept = Encoders(eva_vit=eva_vit).fingerprints(config)
    check_image_tokens(write_meta(tmp_path, encoders=kept), eva_vit)
    check_image_tokens(write_meta(tmp_path, encoders={"mae": "a"}), eva_vit)
    with pytest.raises(UserError, match=rf"eva_vit features of another, and here they are of {kept['eva_vit']}; give"):
        check_image_tokens(write_meta(tmp_path, encoders={"eva_vit": "another"}), eva_vit)


@pytest.mark.parametrize(
    ("meta", "rules"),
    [({"frames": ["peak"]}, ["peak"]), ({"frames": ["5", "first"]}, ["5", "first"]), ({"frames": None}, []), ({}, [])],
)
def test_the_frame_rules_of_a_run(tmp_path, meta, rules):
    assert learnt_frame_rules(write_meta(tmp_path, **meta)) == rules


def test_other_trained_weights_say_nothing(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    assert learnt_frame_rules(tmp_path / "checkpoint.pth") == []
    check_encoders(tmp_path / "checkpoint.pth", {"mae": "b"}, all_known=True)
