"""Image-text checkpoints: their text works as in the stock model, their images are refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    LlavaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers import LlavaForConditionalGeneration as Llava

import kvtrim
import models
from kvtrim.errors import UnsupportedModelError, UsageError
from kvtrim.hf.base import cache_keyword
from small import small

EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "patch_size": 8}
EYES |= {"num_attention_heads": 2, "image_size": 32}
MARKS = {"image_token_id": 270, "boi_token_id": 271, "eoi_token_id": 272}


def made(kind):
    """As `AutoModelForCausalLM` gives it, where that knows the kind."""
    torch.manual_seed(0)
    if kind == "gemma3":
        text = models.config("gemma3_text").to_dict()
        config = Gemma3Config(
            text_config=text, vision_config=EYES, mm_tokens_per_image=16, **MARKS
        )
        model = AutoModelForCausalLM.from_config(config)
    elif kind == "llava":
        eyes = {"model_type": "clip_vision_model", "projection_dim": 32, **EYES}
        text = models.config("llama").to_dict()
        model = Llava(LlavaConfig(text_config=text, vision_config=eyes, image_token_id=270))
    else:
        eyes = {"model_type": "siglip_vision_model", "projection_dim": 48, **EYES}
        text = {**models.config("gemma").to_dict(), "num_image_tokens": 16}
        config = PaliGemmaConfig(
            text_config=text, vision_config=eyes, image_token_id=270, projection_dim=48
        )
        model = PaliGemmaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.fixture(params=["gemma3", "llava"])
def model(request):
    return made(request.param)


def test_text_is_read_as_by_the_stock_model(model):
    ids, mask = models.prompt(50, rows=2), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :7] = 0
    kinds = torch.zeros_like(ids)
    given = {"attention_mask": mask} | (
        {"token_type_ids": kinds} if "Gemma" in repr(model) else {}
    )
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain, stock = DynamicCache(config=model.config), []
        stock.append(
            model(ids[:, :40], **cache_keyword(plain), attention_mask=mask[:, :40]).logits
        )
        stock.append(model(ids[:, 40:], **cache_keyword(plain), attention_mask=mask).logits)
        with kvtrim.attach(model):
            cache = kvtrim.Cache(model, "full")
            first = {name: each[:, :40] for name, each in given.items()}
            got = [model(ids[:, :40], **cache_keyword(cache), **first).logits]
            got.append(model(ids[:, 40:], **cache_keyword(cache), attention_mask=mask).logits)
    for mine, theirs in zip(got, stock, strict=True):
        torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(got[0][1, 7:], stock[0][1, 7:])
    torch.testing.assert_close(got[1], stock[1])
    assert torch.equal(cache.token_ids, ids) and at is not None


def test_generate_continues_text_as_the_stock_model(model):
    ids = models.prompt(50)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    with kvtrim.attach(model):
        full = model.generate(ids, **cache_keyword(kvtrim.Cache(model, "full")), **options)
        small_one = kvtrim.Cache(model, "snapkv", 16, window=8)
        model.generate(ids, **cache_keyword(small_one), **options)
    assert torch.equal(full, want)
    held = [int(small_one.entries()[layer].max()) for layer in small_one.managed]
    assert max(held) == 16 + 4, "16 of the prompt, and new tokens but the last"


def test_their_text_can_be_compressed_and_asked_with_probes_too(model):
    tokenizer = models.tokenizer()
    text = "The key to the cellar lies under the third stone from the left. " * 3
    for method in ("snapkv", "kvzip"):
        own = small(method)
        cache = kvtrim.compress(model, tokenizer, text, method=method, keep=40, **own)
        result = kvtrim.generate(model, tokenizer, cache, "Where is it?", max_new_tokens=3)
        assert result.held_bytes < result.full_bytes


@pytest.mark.parametrize("name", ["pixel_values", "image_sizes", "pixel_values_videos"])
def test_images_are_refused_before_any_work(model, name):
    cache, ids = kvtrim.Cache(model, "full"), models.prompt(20)
    with torch.no_grad(), kvtrim.attach(model):
        with pytest.raises(UsageError, match=rf"text alone, and {name} came"):
            model(ids, **cache_keyword(cache), **{name: torch.zeros(1, 3, 32, 32)})
        assert cache.seen == 0
        model(ids, **cache_keyword(cache))
        assert cache.seen == 20


def test_kinds_of_tokens_that_name_an_image_are_refused():
    model = made("gemma3")
    kinds = torch.zeros(1, 20, dtype=torch.int64)
    kinds[:, 4:8] = 1
    with torch.no_grad(), kvtrim.attach(model), pytest.raises(UsageError, match="token_type_ids"):
        model(
            models.prompt(20), **cache_keyword(kvtrim.Cache(model, "full")), token_type_ids=kinds
        )


def test_ordinary_caches_take_images_on_an_attached_model():
    model, ids = made("llava"), models.prompt(30)
    ids[:, 3:19] = 270
    picture = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        want = model(ids, pixel_values=picture).logits
        with kvtrim.attach(model):
            assert torch.equal(model(ids, pixel_values=picture).logits, want)


def test_a_prompt_that_is_read_both_ways_is_refused():
    """PaliGemma's text is Gemma's, but its tokens see later ones."""
    model = made("paligemma")
    later = pytest.raises(UnsupportedModelError, match="left to right")
    with torch.no_grad(), kvtrim.attach(model), later:
        model(models.prompt(20), **cache_keyword(kvtrim.Cache(model, "full")))
