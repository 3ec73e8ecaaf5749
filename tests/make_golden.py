"""Write tests/golden/: four tiny random T5s and what Hugging Face transformers computes with them.

    pip install transformers && python tests/make_golden.py

    python tests/make_golden.py --check      transformers reads what model.save_pretrained writes

The tests need only the files. A folder holds config.json and pytorch_model.bin, as transformers saves them,
and expected.pt: inputs, logits, loss, the gradient of every tensor, and what beam search writes.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import EncoderDecoder, ModelConfig, load_pretrained, save_pretrained  # noqa: E402

HERE = Path(__file__).parent / "golden"
# d_kv * num_heads != d_model; sequences far beyond max_distance
SHAPE = dict(
    vocab_size=40,
    d_model=16,
    d_kv=6,
    num_heads=2,
    d_ff=20,
    num_layers=2,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    dropout_rate=0.1,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
)
KINDS = {
    "t5": (
        T5Config,
        T5ForConditionalGeneration,
        dict(feed_forward_proj="relu", tie_word_embeddings=True),
    ),
    "t5-v1.1": (
        T5Config,
        T5ForConditionalGeneration,
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "mt5": (
        MT5Config,
        MT5ForConditionalGeneration,
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "umt5": (
        UMT5Config,
        UMT5ForConditionalGeneration,
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def main() -> None:
    for kind, (config_class, model_class, extra) in KINDS.items():
        torch.manual_seed(0)
        config = config_class(**SHAPE, **extra)
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        if not extra[
            "tie_word_embeddings"
        ]:  # transformers 5 ties at first whatever the config says
            model.lm_head.weight = torch.nn.Parameter(torch.empty(40, 16))
        for p in (
            model.parameters()
        ):  # gains and biases away from 1 and 0; scores large enough to tell positions apart
            p.data = torch.randn(p.shape) * 0.3 + (1.0 if p.dim() == 1 else 0.0)
        source = torch.randint(2, 40, (3, 24))
        source[1, 17:] = source[2, 5:] = 0
        target = torch.randint(2, 40, (3, 19))
        target[0, 12:], target[2, 3:] = 0, 0
        for row, end in ((0, 11), (1, 18), (2, 2)):
            target[row, end] = 1
        start = torch.cat([torch.zeros(3, 1, dtype=torch.long), target[:, :-1]], 1)
        labels = target.masked_fill(target == 0, -100)
        out = model(
            input_ids=source,
            attention_mask=(source != 0).long(),
            decoder_input_ids=start,
            labels=labels,
        )
        out.loss.backward()
        tensors = dict(model.named_parameters())
        beams = {}
        for penalty in (0.6, 1.0, 2.0):
            beams[penalty] = model.generate(
                input_ids=source,
                attention_mask=(source != 0).long(),
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=12,
                do_sample=False,
                length_penalty=penalty,
                early_stopping=False,
            )
        expected = {
            "source": source,
            "target": target,
            "logits": out.logits.detach(),
            "loss": out.loss.detach(),
            "grads": {name: p.grad for name, p in tensors.items()},
            "beams": beams,
            "transformers": transformers.__version__,
        }
        folder = HERE / kind
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(config.to_json_string()) | {"architectures": [model_class.__name__]}
        (folder / "config.json").write_text(
            json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        torch.save(
            {name: value.clone() for name, value in model.state_dict().items()},
            folder / "pytorch_model.bin",
        )
        torch.save(expected, folder / "expected.pt")
        print(
            kind,
            f"{sum(p.numel() for p in model.parameters()):,} parameters",
            f"loss {out.loss.item():.4f}",
        )


def check() -> None:
    """Every kind, and models from scratch, through save_pretrained into transformers: the same logits."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=40,
        width=16,
        heads=2,
        head_size=6,
        ff=20,
        encoder_layers=1,
        decoder_layers=2,
        scaled=False,
        absolute=False,
    )
    models = {kind: load_pretrained(str(HERE / kind)) for kind in KINDS}
    models |= {
        f"from scratch, tied={tied}, gated={gated}": EncoderDecoder(
            ModelConfig(**shape, tied=tied, gated=gated)
        )
        for tied in (True, False)
        for gated in (True, False)
    }
    for name, ours in models.items():
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(ours.eval(), Path(folder))
            theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        source, tokens = torch.randint(2, 40, (3, 20)), torch.randint(2, 40, (3, 9))
        logits = theirs(input_ids=source, decoder_input_ids=tokens).logits
        difference = (
            ours.logits(ours.decode(tokens, ours.encode(source))) - logits
        ).abs().max() / logits.abs().max()
        print(f"{name:35} largest difference {difference:.1e} of the largest logit")
        assert difference < 1e-5


if __name__ == "__main__":
    check() if "--check" in sys.argv else main()
