"""Pretrained T5s: equal to Hugging Face's, from files that tests/make_golden.py wrote; and what is refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import assert_near
from model import (
    Cache,
    EncoderDecoder,
    ModelConfig,
    UserError,
    beam_search,
    load_pretrained,
    pretrained_folder,
    read_json,
    read_weights,
    save_pretrained,
    t5_config,
    t5_tensors,
)
from warmup import Batch, sft_loss

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("t5", "t5-v1.1", "mt5", "umt5")


@pytest.fixture(params=KINDS)
def golden(request):
    """(model, what transformers computed with it, name of the kind)"""
    folder = GOLDEN / request.param
    return load_pretrained(str(folder)).eval(), torch.load(folder / "expected.pt"), request.param


def decoder_input(target):
    return torch.cat([torch.zeros(len(target), 1, dtype=torch.long), target[:, :-1]], 1)


def test_logits_equal(golden):
    """With padding on both sides, and distances of 23 where the last bucket begins at 10."""
    model, expected, _ = golden
    source, target = expected["source"], expected["target"]
    logits = model.logits(model.decode(decoder_input(target), model.encode(source)))
    real = target != 0
    assert_near(logits[real], expected["logits"][real])


def test_loss_and_every_gradient_equal(golden):
    model, expected, kind = golden
    source, target = expected["source"], expected["target"]
    batch = Batch(source, torch.zeros(3, 0, dtype=torch.long), target)
    loss = sft_loss(model, batch) / (target != 0).sum()
    loss.backward()
    assert torch.allclose(loss, expected["loss"], rtol=1e-5)
    seen = set()
    for ours, parameter in model.named_parameters():
        theirs = t5_tensors(ours, model.config)
        for name, grad in zip(theirs, parameter.grad.chunk(len(theirs))):
            if kind == "umt5" and name == "lm_head.weight":  # we folded its scale into the weight
                grad = grad * 16**-0.5
            assert_near(grad, expected["grads"][name])
            seen.add(name)
    assert seen == expected["grads"].keys()


def test_cached_decoding_equals(golden):
    model, expected, _ = golden
    memory, tokens = model.encode(expected["source"]), decoder_input(expected["target"])
    cache = Cache(model.decoder, tokens.size(1))
    steps = [
        model.logits(model.decode(tokens[:, t : t + 1], memory, cache))
        for t in range(tokens.size(1))
    ]
    real = expected["target"] != 0
    assert_near(torch.cat(steps, 1)[real], expected["logits"][real])


@pytest.mark.parametrize("penalty", (0.6, 1.0, 2.0))
def test_beams_equal_token_for_token(golden, penalty):
    """generate(num_beams=4, num_return_sequences=4, early_stopping=False): all four beams, best first."""
    model, expected, _ = golden
    start = torch.zeros(3, 1, dtype=torch.long)
    tokens, _ = beam_search(
        model, model.encode(expected["source"]), start, 12, beams=4, length_penalty=penalty
    )
    theirs = expected["beams"][penalty].view(3, 4, -1)[:, :, 1:]  # without the start token
    theirs = theirs.masked_fill(
        (theirs == 1).int().cumsum(-1) - (theirs == 1).int() > 0, 0
    )  # it fills up with </s>
    assert (
        torch.equal(tokens[:, :, : theirs.size(2)], theirs)
        and not tokens[:, :, theirs.size(2) :].any()
    )


def test_save_and_load_again(golden, tmp_path):
    """Nothing is lost. (That transformers reads it to the same logits: python tests/make_golden.py --check.)"""
    model, expected, kind = golden
    save_pretrained(model, tmp_path)
    again = load_pretrained(str(tmp_path))
    assert all(
        torch.allclose(p, again.get_parameter(name), rtol=1e-6)
        for name, p in model.named_parameters()
    )
    assert read_weights(tmp_path).keys() <= read_weights(GOLDEN / kind).keys()


@pytest.mark.parametrize("tied", (True, False))
def test_a_t5_from_scratch_can_leave_and_return(tmp_path, tied):
    """One without gates, tied or not: the same logits."""
    c = ModelConfig(
        vocab_size=30,
        width=16,
        heads=2,
        head_size=6,
        ff=20,
        encoder_layers=1,
        decoder_layers=2,
        tied=tied,
        scaled=False,
        absolute=False,
    )
    model = EncoderDecoder(c).eval()
    save_pretrained(model, tmp_path)
    again = load_pretrained(str(tmp_path)).eval()
    source, tokens = torch.randint(2, 30, (2, 7)), torch.randint(2, 30, (2, 5))
    logits = [m.logits(m.decode(tokens, m.encode(source))) for m in (model, again)]
    assert replace(again.config, dropout=c.dropout) == c
    assert_near(*logits)


@pytest.mark.parametrize("changes", [dict(), dict(absolute=False), dict(scaled=False)])
def test_a_model_that_is_no_t5_cannot_leave(tmp_path, changes):
    """It has our scaling, our positions, or both."""
    with pytest.raises(UserError, match="only --init runs export"):
        save_pretrained(EncoderDecoder(ModelConfig(vocab_size=30, width=16, **changes)), tmp_path)
    assert not list(tmp_path.iterdir())


def copy(kind, folder):
    return Path(shutil.copytree(GOLDEN / kind, folder / kind))


def test_half_precision_files_become_float32(tmp_path):
    folder = copy("t5", tmp_path)
    torch.save(
        {name: x.half() for name, x in read_weights(folder).items()}, folder / "pytorch_model.bin"
    )
    model = load_pretrained(str(folder), dropout=0.3)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.dropout == 0.3


def test_shards(tmp_path):
    folder, tensors = copy("umt5", tmp_path), read_weights(GOLDEN / "umt5")
    names = sorted(tensors)
    shards = {
        f"pytorch_model-0000{i}-of-00002.bin": part
        for i, part in enumerate((names[:9], names[9:]), 1)
    }
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    whole, sharded = load_pretrained(str(GOLDEN / "umt5")), load_pretrained(str(folder))
    assert all(torch.equal(p, sharded.get_parameter(name)) for name, p in whole.named_parameters())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="encoder|shared"):
        load_pretrained(str(folder))


def test_all_shards_of_safetensors_are_read(tmp_path, monkeypatch):
    """By a stand-in for the package: each shard holds some of the tensors."""
    folder, tensors = copy("umt5", tmp_path), read_weights(GOLDEN / "umt5")
    names = sorted(tensors)
    parts = {f"model-0000{i}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file in parts:
        (folder / file).write_bytes(b"")
    module = ModuleType("safetensors.torch")
    module.load_file = lambda path: {name: tensors[name] for name in parts[Path(path).name]}
    monkeypatch.setitem(sys.modules, "safetensors", ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    found = read_weights(folder)
    assert sorted(found) == names
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="pip install safetensors to test reading it"
    )
    folder = copy("mt5", tmp_path)
    safetensors.save_file(read_weights(folder), folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    model = load_pretrained(str(folder))
    assert torch.equal(model.output.weight, load_pretrained(str(GOLDEN / "mt5")).output.weight)


def test_old_files_with_copies_and_an_unused_tensor(tmp_path):
    """Checkpoints of 2019 hold the embedding four times, and a cross-attention bias that nothing reads."""
    folder, tensors = copy("t5", tmp_path), read_weights(GOLDEN / "t5")
    shared = tensors["shared.weight"]
    tensors |= {
        "encoder.embed_tokens.weight": shared,
        "decoder.embed_tokens.weight": shared,
        "lm_head.weight": shared,
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 2),
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_pretrained(str(folder)).config.tied
    tensors["encoder.embed_tokens.weight"] = shared + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="differs from shared.weight"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("kind", ("t5-v1.1", "mt5"))
def test_transformers_5_ties_what_it_makes_new(kind, tmp_path):
    """A v1.1 or mT5 made by it, not loaded, is written without lm_head, and computes with the embedding, unscaled."""
    folder, tensors = copy(kind, tmp_path), read_weights(GOLDEN / kind)
    del tensors["lm_head.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(settings | {"tie_word_embeddings": False}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="lm_head.weight"):
        load_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(settings | {"tie_word_embeddings": True}), encoding="utf-8"
    )
    model = load_pretrained(folder)
    assert (
        torch.equal(model.output.weight, model.embedding.weight)
        and model.output.weight is not model.embedding.weight
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model_type": "bart"}, "'bart' is not a T5"),
        ({"model_type": "bert"}, "'bert' is not a T5"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id"),
        ({"d_ff": 24}, "feed_forward.up|DenseReluDense.wi"),
        ({"num_layers": 3}, "encoder.block.2"),
        ({"num_decoder_layers": 1}, "decoder.block.1"),
        ({"model_type": "umt5"}, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"d_model": -16}, "d_model = -16"),
        ({"d_kv": "8"}, "d_kv = '8'"),
        ({"d_ff": 10**12}, "d_ff = 1000000000000"),
        ({"num_layers": 10**9}, "num_layers = 1000000000"),
        ({"num_layers": 1001}, "num_layers = 1001"),
        ({"num_decoder_layers": "2"}, "num_decoder_layers = '2'"),
        ({"relative_attention_num_buckets": 1}, "relative_attention_num_buckets = 1"),
        ({"relative_attention_max_distance": 3}, "relative_attention_max_distance = 3"),
        ({"relative_attention_max_distance": "x"}, "relative_attention_max_distance = 'x'"),
        ({"pad_token_id": 3}, "pad_token_id = 3"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id = \[1, 2\]"),
        ({"eos_token_id": 2}, "eos_token_id"),
        ({"vocab_size": True}, "vocab_size = True"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, complaint):
    folder = copy("t5", tmp_path)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | change), encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        load_pretrained(str(folder))


def test_null_is_as_good_as_nothing(tmp_path):
    """What has a usual value may be missing from config.json, or be null."""
    folder = copy("t5", tmp_path)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("pad_token_id", "eos_token_id", "layer_norm_epsilon", "num_decoder_layers")
    null = settings | dict.fromkeys(names)
    missing = {name: value for name, value in settings.items() if name not in names}
    for changed in (null, missing):
        (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        assert load_pretrained(folder).config == load_pretrained(GOLDEN / "t5").config
    small = {"model_type": "t5", "feed_forward_proj": None}
    small |= dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"), 3)
    c = t5_config(small)
    assert (c.buckets, c.max_distance, c.decoder_layers) == (32, 128, 3)
    assert c.tied and not c.gated


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: x * float("inf"), "not finite"),
        (lambda x: x[0], "size|dimension"),
        (lambda x: x.sum(), "dimension"),
        (lambda x: x[None], "size|dimension"),
        (lambda x: x[:-1], "size"),
        (lambda x: 7, "Tensor|tensor"),
        (lambda x: x.tolist(), "Tensor|tensor"),
        (lambda x: None, "Tensor|tensor"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        "shared.weight",
        "decoder.final_layer_norm.weight",
    ],
)
def test_tensors_of_wrong_content_or_shape(tmp_path, name, damage, complaint):
    folder = copy("t5", tmp_path)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors = {name: x for name, x in tensors.items() if "embed_tokens" not in name}
    tensors[name] = damage(tensors[name])
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=complaint):
        load_pretrained(folder)


def test_weights_that_could_not_be_read_are_not_downloaded(monkeypatch):
    """Without safetensors the hub is asked for pytorch_model.bin alone."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda source, allow_patterns: asked.append(allow_patterns[-1]) or "/no",
    )
    for installed, first in ((object(), "model*.safetensors"), (None, "pytorch_model*.bin")):
        asked.clear()
        monkeypatch.setattr("model.find_spec", lambda name: installed)
        pretrained_folder("google/no-such-model")
        assert asked[0] == first


def test_missing_or_broken_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = copy("t5", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="damaged"):
        load_pretrained(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no pytorch_model.bin and no model.safetensors"):
        load_pretrained(str(folder))
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="config.json"):
        load_pretrained(str(folder))
    missing = (
        "google/no-such-model",
        "/no/such/folder",
        Path("/no/such/folder"),
        str(folder / "config.json"),
    )
    for source in missing:
        for function in (load_pretrained, pretrained_folder):
            with pytest.raises(UserError, match=f"{source}.* no folder"):
                function(source)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"[[0, 1]]", b"3", b"", b"\xff"])
def test_what_is_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        read_json(path)
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(path) == {"a": "ü"}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"num_heads": "4"}, "num_heads = '4'"),
        ({"d_ff": None}, "d_ff = None"),
        ({"d_ff": 2.5}, "d_ff = 2.5"),
        ({"d_ff": 2.5, "d_kv": None}, "d_kv = None"),
    ],
)
def test_sizes_must_be_whole_numbers(change, complaint):
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    settings = {"model_type": "t5"} | dict.fromkeys(names, 1)
    assert t5_config(settings).ff == 1
    with pytest.raises(UserError, match=complaint):
        t5_config(settings | change)
