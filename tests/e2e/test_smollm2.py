"""SmolLM2-135M, a real model, from GGUF to a Hugging Face folder: what it says, and how well it predicts English."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import cli
from emollama_jax.config import GenerateConfig
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama

pytestmark = pytest.mark.slow

PARAGRAPH = (
    "The old woman at the window had been watching the street since morning. When the postman finally turned the "
    "corner, she pressed both hands against the glass, and for a moment her whole face seemed to grow younger. He "
    "shook his head before he reached the gate; there was nothing for her today, as there had been nothing yesterday. "
    "She nodded slowly, smiled at him as if to say that it did not matter, and drew the curtain. Only her voice, when "
    "she called her grandson to breakfast a little later, gave her away: it was much too cheerful, and it broke in "
    "the middle of his name. The boy looked up from his book and decided to ask nothing."
)
TEXTS = [
    PARAGRAPH,
    "<|im_start|>user\nHow does she feel?<|im_end|>\n<|im_start|>assistant\n",
    "  two  spaces, a tab\t, 1234567 and a line\n\n\nbreak",
    "Grüße, 你好, 😀!",
    "",
]
FLOAT32 = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "none"}


@pytest.fixture(scope="module")
def folder(smollm2_gguf, tmp_path_factory):
    """The model as a float32 Hugging Face folder, half a gigabyte."""
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    assert cli.main(["convert", str(smollm2_gguf), str(path), "--to", "hf", "--dtype", "float32"]) == 0
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_base_tokenizer(folder, 49152)


@pytest.fixture(scope="module")
def model(folder):
    return load_llama(folder, kernel_dtype="float32", **FLOAT32)[0]


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """The paragraph [1, T], after the token that begins a text."""
    return np.array([[tokenizer.bos_id, *tokenizer.encode(PARAGRAPH)]])


@nnx.jit
def mean_nll(model, tokens):
    """Of all tokens but the first, in nats."""
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model(model.embed_tokens(tokens), positions, jnp.ones_like(tokens))
    return model.token_nll(hidden[:, :-1], tokens[:, 1:]).mean()


@pytest.fixture(scope="module")
def float_nll(model, tokens):
    return float(mean_nll(model, tokens))


def test_it_knows_the_capital_of_france(model, tokenizer):
    assert model.config.tie_embeddings
    assert (model.config.num_layers, model.config.num_kv_heads) == (30, 3)
    batcher = SlotBatcher(model, [tokenizer.eos_id])
    prompt = tokenizer.encode("The capital of France is")
    (answer,) = batcher.run([GenerationRequest(prompt, GenerateConfig(max_new_tokens=4))])
    text = tokenizer.decode(answer.tokens)
    print(repr(text))
    assert text.startswith(" Paris")


def test_it_predicts_english_as_torch_does(folder, float_nll, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        torch_nll = theirs(ids, labels=ids).loss.item()
    print(f"mean NLL of {tokens.shape[1] - 1} tokens: {float_nll:.6f}, torch {torch_nll:.6f}")
    assert abs(float_nll - torch_nll) <= 1e-4
    assert 2 < float_nll < 4


@pytest.fixture
def optimised():
    """As for users: unpacking 4-bit kernels takes longer in code that is left as it comes than compiling it well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("dtype", "products", "bound"), [("int8", "none", 0.01), ("int8", "all", 0.01), ("nf4", "none", 0.1)]
)
def test_quantisation_costs_little(folder, float_nll, tokens, dtype, products, bound):
    model, _ = load_llama(folder, kernel_dtype=dtype, int8_products=products, **FLOAT32)
    nll = float(mean_nll(model, tokens))
    print(f"mean NLL: {nll:.4f} with {dtype} kernels ({products} integer products), {float_nll:.4f} with float32")
    assert abs(nll - float_nll) < bound


def test_the_tokenizer_is_the_one_transformers_reads(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]
    assert theirs.chat_template == tokenizer.chat_template
