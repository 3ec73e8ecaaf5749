"""Train: SFT, then warmups by policy gradient, then SFT again for the same time as the control.

    python train.py --task wmt                  everything on the built-in sample, 4 minutes on 2 cores
    python train.py --resume runs/wmt           go on where a run was interrupted
    torchrun --nproc_per_node 2 train.py …      the same by several processes: a GPU each, or CPUs

A run folder holds config.json, tokenizer.json, log.jsonl, last.pt (all that --resume needs), the best
checkpoint of each stage by validation (sft.pt, policy.pt, control.pt), and results.json.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import (EOS, PAD, TASKS, Batches, Encoded, Example, UserError, add_up, all_sums, encode_split, first_to_fail,
                  for_pair, gather, load_pairs, pretrained_tokenizer, processes, prompt_tags, rank, special_ids,
                  train_tokenizer)
from eval import (CONTROLS, FORMAT, STAGES, Row, averages, decode_and_score, load_checkpoint, load_config, load_tokenizer,
                  make_metrics, out_of_memory, pick_device, precision, print_examples, print_means, print_table,
                  score_stage, signatures, validate, warmup_spec)
from model import SIZES, EncoderDecoder, ModelConfig, load_pretrained, pretrained_folder
from warmup import ESTIMATORS, all_warmups, sft_loss, target_tokens, warmup_loss


def flag(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Each field is a flag (--sft-steps for sft_steps); saved as config.json."""

    task: str = flag("wmt", "what to train on", tuple(TASKS))
    pair: str = flag("de-en", "source-target language codes; several for one model of several directions: "
                     "de-en,en-de,en-fr")
    data: str = flag("", "folder of parallel text; 'sample': the built-in one; default: data/TASK if it exists, else that")
    sample_size: int = flag(20000, "training examples to generate for the built-in sample")
    symbols: int = flag(16, "task toy: letters in the permutation, at most 26")
    hops: int = flag(2, "task toy: most look-ups a question asks for; 0: copy, the negative control")
    out: str = flag("", "run folder; default: runs/TASK")
    overwrite: bool = flag(False, "replace an earlier run in the same folder")
    seed: int = flag(0, "for initial weights, batches, dropout, sampling and the sample")
    # model
    init: str = flag("", "pretrained T5, Flan-T5, mT5 or umT5 to start from: a Hugging Face folder, or a name on its "
                     "hub; size and vocabulary are its own, and the learning rates default to 3e-4 and 1e-4")
    size: str = flag("tiny", "model size", tuple(SIZES))
    vocab_size: int = flag(4000, "tokens in the vocabulary (at most: a small corpus may have fewer)")
    dropout: float = flag(0.1, "probability of dropping an activation")
    recompute: bool = flag(False, "keep each layer's input only and compute the rest again for the backward pass: "
                           "less memory, the time of one more forward pass")
    max_tokens: int = flag(128, "tokens; longer training pairs are left out, longer sources cut, outputs stopped")
    # optimisation
    sft_steps: int = flag(300, "updates of the SFT stage")
    policy_steps: int = flag(120, "updates of the warmup stage; 0: SFT only")
    control: bool = flag(True, "afterwards continue SFT for the warmup stage's time, the fair comparison")
    batch_tokens: int = flag(3000, "tokens of source and target, padding included, per SFT micro-batch")
    policy_batch_tokens: int = flag(1500, "the same for the warmup stage, which holds each target --samples times")
    accumulate: int = flag(1, "micro-batches per update, of each process")
    lr: float = flag(3e-3, "peak learning rate of SFT")
    policy_lr: float = flag(1e-3, "peak learning rate of the warmup stage and of its control")
    lr_rampup_steps: int = flag(100, "updates of linear rise to the peak, at most a quarter of the stage; then linear fall")
    weight_decay: float = flag(0.01, "AdamW's decay of weight matrices")
    clip: float = flag(1.0, "largest norm of the gradient; longer ones are scaled down")
    label_smoothing: float = flag(0.1, "share of SFT's target probability that is spread over the vocabulary")
    # warmups
    estimator: str = flag("marginal", "policy gradient estimator, see warmup.py; exact: over all warmups, toys only; "
                          "controls: pause (constant tokens for c), sft (no c)", (*ESTIMATORS, "exact", "pause", "sft"))
    samples: int = flag(4, "K, warmups sampled per example and update")
    warmup_len: int = flag(4, "W, tokens in a warmup")
    warmup_min_len: int = flag(0, "from this many tokens on <sep> may end a warmup; 0: always W tokens")
    alpha: float = flag(1.0, "factor on the reward; with marginal, 0: all warmups count alike, large: only the best")
    entropy_bonus: float = flag(0.0, "weight of the policy's entropy (nats), falling linearly to 0 over the stage")
    sft_weight: float = flag(0.0, "weight of log P(y|x) without warmup, trained beside")
    temperature: float = flag(1.0, "softmax temperature of the warmup policy, in sampling and scoring alike")
    # evaluation
    eval_every: int = flag(100, "updates between validations; each also saves last.pt")
    eval_samples: int = flag(4, "warmups per example in the Monte-Carlo estimate of the validation and test NLL")
    eval_decode: int = flag(0, "validation examples to write out and score at each validation")
    beams: int = flag(4, "beam width for the test table; 1: greedy")
    length_penalty: float = flag(1.0, "beam score = log-prob / length ** this")
    # machine
    device: str = flag("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products; auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile for encoder and decoder: minutes at first, which count as SFT's time and so "
                         "shorten the control of a short run")
    threads: int = flag(0, "CPU threads; 0: torch's choice")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.task}")


def parse(argv: list[str]) -> tuple[Config, str]:
    """The config and the run to resume ("" for a new one). Exits with code 2 on bad usage."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--task", default=Config.task)
    task.add_argument("--init")
    known = task.parse_known_args(argv)[0]
    own = TASKS.get(known.task)  # the task's settings; --help shows them too
    settings = own.settings | ({} if known.init else own.scratch) if own else {}
    settings |= {"lr": 3e-4, "policy_lr": 1e-4} if known.init else {}  # T5's weights are large and need no big steps
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--resume", metavar="RUN", default="", help="run folder to continue, with its own settings")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), default=settings.get(f.name, f.default),
                            help=f.metadata["help"] or " ", **kind)
    args = vars(parser.parse_args(argv))
    resume = args.pop("resume")
    config = Config(**args)
    if resume and any(word.startswith("--") and word.split("=")[0] != "--resume" for word in argv):
        parser.error("--resume takes every setting from the run's config.json: give no other flag")
    at_least = {"seed": 0, "sample_size": 1, "vocab_size": 300, "max_tokens": 2, "sft_steps": 1, "policy_steps": 0,
                "accumulate": 1, "batch_tokens": 16, "policy_batch_tokens": 16, "samples": 1, "warmup_len": 1,
                "warmup_min_len": 0, "eval_every": 1, "eval_samples": 1, "beams": 1, "weight_decay": 0,
                "lr_rampup_steps": 0, "threads": 0, "symbols": 2, "hops": 0, "eval_decode": 0, "alpha": 0,
                "entropy_bonus": 0, "sft_weight": 0, "length_penalty": 0}
    for name, low in at_least.items():
        if not low <= getattr(config, name) < 2**63:  # nan is no setting either
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, and below 2**63")
    for name in ("lr", "policy_lr", "clip", "temperature"):
        if not 0 < getattr(config, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and finite")
    if not (0 <= config.dropout < 1 and 0 <= config.label_smoothing < 1):
        parser.error("--dropout and --label-smoothing must lie in [0, 1)")
    if config.symbols > 26 or config.hops > 9:
        parser.error("--symbols are letters, at most 26; --hops is a digit")
    if config.init and any(word.split("=")[0] in ("--size", "--vocab-size") for word in argv):
        parser.error("--init brings its own size and vocabulary: leave --size and --vocab-size out")
    if config.eval_decode and "," in config.pair:
        parser.error("--eval-decode scores one direction, and --pair names several")
    if config.entropy_bonus and config.estimator == "exact":
        parser.error("--entropy-bonus is for sampled warmups: leave it out with --estimator exact")
    if config.warmup_min_len > config.warmup_len:
        parser.error("--warmup-min-len must not exceed --warmup-len")
    one_is_enough = config.estimator in ("best", "exact", *CONTROLS) and not config.entropy_bonus
    if not one_is_enough and config.policy_steps and config.samples < 2:
        parser.error(f"--estimator {config.estimator} compares warmups with each other: --samples must be at least 2")
    return config, resume


# ----------------------------------------------------------------------------- files


def write_atomically(path: Path, save) -> None:
    """save(temporary path), then rename: whatever interrupts us, `path` holds the old or the new, whole.

    By rank 0. The others wait: nobody still reads the old file, or already the new one, while it is written.
    """
    gather(None)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if rank() == 0:
            save(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}): free some disk space, then go on with "
                        f"python train.py --resume {path.parent}") from None
    gather(None)


def write_checkpoint(path: Path, what: str, **content) -> None:
    write_atomically(path, lambda p: torch.save({"format": FORMAT, "what": what} | content, p))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


# ----------------------------------------------------------------------------- training


@dataclass
class State:
    """All that changes while training, and so all that a resumed run must get back."""

    stage: str = "sft"
    step: int = 0  # updates done in this stage
    total: int = 0  # updates this stage will do
    seconds: float = 0.0  # of training in this stage
    best: float = float("inf")  # lowest validation NLL in this stage
    spent: dict[str, list] = field(default_factory=dict)  # finished stages: [updates, seconds]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the state was saved."""


class Run:
    """Model, data and state of one training run. `train` is the program; the rest serves it."""

    def __init__(self, config: Config, examples: dict[str, list[Example]], data: dict[str, Encoded],
                 tokenizer: Tokenizer, model: EncoderDecoder):
        self.config, self.data, self.examples, self.tokenizer = config, data, examples, tokenizer
        self.folder = config.folder
        self.device = pick_device(config.device)
        self.model = model.to(self.device)
        self.model.encoder.recompute = self.model.decoder.recompute = config.recompute
        if config.compile:
            compile_stacks(self.model)
        self.state, self.stop = State(), False
        self.held_out: dict[str, float] = {}  # the last validation's numbers
        self.start_stage("sft")

    def start_stage(self, stage: str) -> None:
        """Fresh optimizer, batches and counters; the later stages begin at the best SFT weights."""
        c, sft = self.config, self.state.spent.get("sft")
        if stage == "sft":
            total = c.sft_steps
        elif stage == "policy":
            total = c.policy_steps
        else:  # the control: as many SFT updates as fit into the time that the warmup stage took
            total = max(1, round(self.state.spent["policy"][1] / (sft[1] / sft[0])))
        self.state = State(stage, total=total, spent=self.state.spent)
        if stage != "sft":
            self.model.load_state_dict(load_checkpoint(self.folder / "sft.pt")["model"])
        self.batches = self.make_batches()
        self.optimizer = make_optimizer(self.model, c.weight_decay)

    def make_batches(self) -> Batches:
        """Batches of the stage. A control has no K samples, so K times the examples: as many target tokens a step."""
        c, tokens = self.config, self.config.batch_tokens
        if self.state.stage == "policy":
            tokens = c.policy_batch_tokens * (c.samples if c.estimator in ("pause", "sft") else 1)
        return Batches(self.data["train"], tokens, seed=c.seed)

    @property
    def spec(self):
        return warmup_spec(self.state.stage, self.config, self.tokenizer)

    def learning_rate(self) -> float:
        """Linear up over lr_rampup_steps (at most a quarter of the stage), then linear down towards 0."""
        peak = self.config.lr if self.state.stage == "sft" else self.config.policy_lr
        ramp, left = min(self.config.lr_rampup_steps, self.state.total // 4), self.state.total - self.state.step
        return peak * min((self.state.step + 1) / (ramp + 1), left / (self.state.total - ramp))

    def loss(self, batch) -> tuple[torch.Tensor, dict]:
        """The stage's loss of one micro-batch, a sum over target tokens, and its diagnostics (sums)."""
        c, spec = self.config, self.spec
        if spec is None:
            return sft_loss(self.model, batch, c.label_smoothing), {}
        self.model.decoder.eval()  # see warmup_loss: decoder dropout would take the samples off-policy
        estimator, samples = ("frozen", 1) if spec.pause else (c.estimator, c.samples)
        bonus = 0.0 if spec.pause else c.entropy_bonus * (1 - self.state.step / self.state.total)
        return warmup_loss(self.model, batch, spec, estimator, samples, alpha=c.alpha, sft_weight=c.sft_weight,
                           entropy_bonus=bonus)

    def train(self) -> None:
        """One stage, from wherever the state stands: THE training loop."""
        c, s = self.config, self.state
        with tqdm(total=s.total, initial=s.step, desc=s.stage, unit="step", dynamic_ncols=True, mininterval=1,
                  disable=rank() > 0) as bar:
            if s.step == 0 and s.stage != "sft" and s.best == math.inf:  # not if resumed after it
                self.validate_and_save()
            while s.step < s.total:
                started = time.perf_counter()
                self.model.train()
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate()

                # -- the step: gradient of the summed loss over all processes' micro-batches / all their target tokens
                micro_batches = [next(self.batches).to(self.device) for _ in range(c.accumulate)]
                tokens = add_up(sum(target_tokens(self.model, batch) for batch in micro_batches))
                total_loss, stats = 0.0, {}
                for batch in micro_batches:
                    with precision(c, self.device):
                        loss, new = self.loss(batch)
                    (loss / tokens).backward()
                    total_loss += loss.detach()
                    stats = {name: stats.get(name, 0) + value for name, value in new.items()}
                sum_gradients(self.model)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
                if not torch.isfinite(norm):
                    raise UserError(f"the gradient became {norm.item()} in {s.stage} update {s.step + 1}: start again "
                                    f"with a lower {'--policy-lr' if s.stage != 'sft' else '--lr'}")
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                # -- end of the step

                pad = self.model.config.pad_id
                stats |= {"loss": total_loss, "examples": sum(len(batch.source) for batch in micro_batches),
                          "read": sum((b.source != pad).sum() + (b.target != pad).sum() for b in micro_batches)}
                stats = all_sums(stats)
                loss, examples, read = (stats.pop(name) for name in ("loss", "examples", "read"))
                record = {"loss": (loss / tokens).item(), "grad_norm": norm.item(), "lr": self.learning_rate()}
                record |= averages(stats, examples, tokens)
                s.step += 1
                seconds = time.perf_counter() - started
                s.seconds += seconds
                record["tokens_per_second"] = read.item() / seconds
                self.log("train", record)
                bar.set_postfix(progress(self.held_out | record), refresh=False)
                bar.update()
                if s.step % c.eval_every == 0 or s.step == s.total:
                    self.validate_and_save()
                if any(gather(self.stop)):
                    self.save()
                    raise Interrupted
        s.spent[s.stage] = [s.step, gather(s.seconds)[0]]  # one clock, for the control's updates follow from it
        self.finish_stage()

    def validate_and_save(self) -> None:
        """Validate; keep the weights if they are the stage's best; save the state."""
        c, data = self.config, self.data["valid"]
        numbers = validate(self.model, data, c, self.spec)
        if c.eval_decode:
            some = Encoded(*(column[: c.eval_decode] for column in data))
            numbers |= decode_and_score(self.model, self.tokenizer, some, self.examples["valid"][: c.eval_decode], c,
                                        self.spec, c.beams)[0]
        self.log("valid", numbers)
        self.held_out = {name: value for name, value in numbers.items() if name in ("swap_gap", "over_empty")}
        if numbers["nll"] < self.state.best:
            self.state.best = numbers["nll"]
            self.save_stage(self.state.stage, self.model.state_dict(), self.state.step)
        self.save()

    def save_stage(self, stage: str, weights: dict, best_step: int) -> None:
        """STAGE.pt: the weights, and the training behind them, the SFT stage included."""
        before = self.state.spent.get("sft", [0, 0.0]) if stage != "sft" else [0, 0.0]
        write_checkpoint(self.folder / f"{stage}.pt", "stage", model=weights, model_config=asdict(self.model.config),
                         updates=before[0] + self.state.step, seconds=before[1] + self.state.seconds,
                         best_step=best_step, valid_nll=self.state.best)

    def finish_stage(self) -> None:
        """The best weights stand for the whole stage: note its full cost beside them. Then on to the next."""
        best = load_checkpoint(self.folder / f"{self.state.stage}.pt")
        self.save_stage(self.state.stage, best["model"], best["best_step"])
        order = ["sft", *(["policy"] if self.config.policy_steps else []), *(["control"] if self.has_control else [])]
        following = order[order.index(self.state.stage) + 1 :]
        if following:
            self.start_stage(following[0])
        else:
            self.state.stage = "done"
        self.save()

    @property
    def has_control(self) -> bool:
        return self.config.control and self.config.policy_steps > 0

    def interrupt(self, *_) -> None:
        """Ctrl-C: finish the update, save, leave. A second one leaves at once, with the last checkpoint."""
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def log(self, kind: str, numbers: dict) -> None:
        if rank():
            return
        line = {"kind": kind, "stage": self.state.stage, "step": self.state.step} | numbers
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.folder}/log.jsonl ({error}): free some disk space, then go on "
                            f"with python train.py --resume {self.folder}") from None

    def fingerprint(self) -> int:
        """A checksum of the training data's token ids."""
        return zlib.crc32(np.concatenate(self.data["train"].source + self.data["train"].target))

    def save(self) -> None:
        """last.pt: everything that the next update depends on."""
        cuda = [torch.cuda.get_rng_state()] if self.device.type == "cuda" else []  # of rank 0's GPU
        mps = [torch.mps.get_rng_state()] if self.device.type == "mps" else []
        log = self.folder / "log.jsonl"
        log_bytes = log.stat().st_size if log.exists() else 0
        write_checkpoint(self.folder / "last.pt", "state", state=asdict(self.state), model=self.model.state_dict(),
                         model_config=asdict(self.model.config),
                         optimizer=self.optimizer.state_dict(), batches=self.batches.state_dict(),
                         rng=torch.get_rng_state(), cuda_rng=cuda, mps_rng=mps,
                         data=self.fingerprint(), log_bytes=log_bytes)

    def resume(self, saved: dict) -> None:
        """Take up last.pt: the next update is bit for bit what would have followed (on a CPU, by one process)."""
        if saved["data"] != self.fingerprint():
            raise UserError(f"the training data in {self.config.data} is not what {self.folder} was trained on, or not "
                            "what rank 0 reads: bring it back, or start a new run")
        self.state = State(**saved["state"])
        if self.state.stage == "done":
            return
        self.batches = self.make_batches()
        self.batches.load_state_dict(saved["batches"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"][0])
        if saved["mps_rng"] and self.device.type == "mps":
            torch.mps.set_rng_state(saved["mps_rng"][0])
        if rank():  # draws of its own; the file holds rank 0's
            torch.manual_seed(hash((self.config.seed, rank(), self.state.step)))
        elif (self.folder / "log.jsonl").exists():
            os.truncate(self.folder / "log.jsonl", saved["log_bytes"])  # forget what came after the checkpoint


def progress(record: dict) -> dict[str, str]:
    """What the progress bar shows: the loss, or in the policy stage, where that says nothing, the diagnostics."""
    names = ("nll", "reward", "spread", "ess", "entropy", "distinct", "swap_gap", "over_empty")
    shown = {name: f"{record[name]:.2f}" for name in (names if "nll" in record else ("loss",)) if name in record}
    return shown | {"tok/s": f"{record['tokens_per_second']:.0f}"}


def sum_gradients(model: EncoderDecoder) -> None:
    """Every gradient, summed over the processes, in one message. Simpler than DDP, which would send while computing."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if processes() > 1:
        vector_to_parameters(add_up(parameters_to_vector(gradients)), gradients)


def compile_stacks(model: EncoderDecoder, **how) -> None:
    """Batches differ in all their lengths: dynamic compiles once for all of them, not once for each.

    The limit is on graphs of both stacks together: with gradients and without, with dropout and without, and once more
    where a length is 1 or two are equal.
    """
    torch._dynamo.config.recompile_limit = 32
    model.encoder.compile(dynamic=True, **how)
    model.decoder.compile(dynamic=True, **how)


def make_optimizer(model: EncoderDecoder, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused where torch has it; gains and position biases are not decayed, matrices are."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "biases" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "biases" in name]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=fused)


# ----------------------------------------------------------------------------- the program


def new_folder(config: Config) -> None:
    """Make the run folder. An earlier run in it is refused, or with --overwrite removed (our files only)."""
    folder = config.folder
    ours = [folder / name for name in ("config.json", "tokenizer.json", "log.jsonl", "results.json", "last.pt")]
    ours += [path for stage in STAGES for path in (folder / f"{stage}.pt", *folder.glob(f"*.{stage}.txt"))]
    if any(path.exists() for path in ours):
        if not config.overwrite:
            begun = (folder / "last.pt").exists()
            what = f"a run: continue it with --resume {folder}, replace it" if begun else "files named as ours: replace them"
            raise UserError(f"{folder} holds {what} with --overwrite, or choose another folder with --out")
        for path in ours:
            path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error}") from None


def new_model(config: Config, examples: list[Example]) -> tuple[EncoderDecoder, Tokenizer]:
    """Pretrained, or from scratch with a tokenizer of its own."""
    if config.init:
        try:
            folder = pretrained_folder(config.init)
            model = load_pretrained(folder, dropout=config.dropout)
            tokenizer = pretrained_tokenizer(folder, prompt_tags(examples), model.config.vocab_size)
        except (OSError, ValueError) as error:
            raise UserError(f"--init {config.init}: {error}") from None
    else:
        tokenizer = train_tokenizer(examples, config.vocab_size)
        model = EncoderDecoder(ModelConfig(vocab_size=tokenizer.get_vocab_size(), dropout=config.dropout,
                                           pad_id=tokenizer.token_to_id(PAD), eos_id=tokenizer.token_to_id(EOS),
                                           **SIZES[config.size]))
    listed = (tokenizer.get_vocab_size() - len(special_ids(tokenizer))) ** config.warmup_len
    if config.estimator == "exact" and listed > 1024:
        raise UserError(f"--estimator exact would list {listed} warmups for every example, and 1024 is our limit: "
                        "shorten --warmup-len, or shrink the vocabulary (toy: --symbols)")
    return model, tokenizer


def memory_estimate(config: Config, c: ModelConfig, parameters: int, data: Encoded) -> dict[str, float]:
    """MiB of one update of each stage in float32. README, Memory, has measurements beside it: a third off at most,
    and some 200 MiB for data and libraries."""
    s, t = (np.mean([len(row) for row in column]) for column in (data.source, data.target))
    block = 28 * c.width + (5 if c.gated else 3) * c.ff  # numbers per token that a layer keeps for its backward pass
    needs = {}
    for stage, tokens, K, more in (("SFT", config.batch_tokens, 1, 0),
                                   ("warmups", config.policy_batch_tokens, config.samples, config.warmup_len + 1)):
        source, target, written = (tokens / (s + t) * n for n in (s, K * (t + more), K * t))  # tokens read, and scored
        kept = (source * c.encoder_layers + target * c.decoder_layers) * block
        if config.recompute:  # each layer's input, and the one layer at work with its gradients
            kept = min(kept, kept / block * c.width + 3 * block * max(source, target))
        logits = 2 * min(2**26, written * c.vocab_size)  # two chunks, see EncoderDecoder.token_logprobs
        needs[stage] = 4 * (4 * parameters + kept + logits) / 2**20  # a parameter: weight, gradient, Adam's two moments
    return needs


def prepare(config: Config, resume: bool) -> tuple[Run, Tokenizer, dict[str, dict[str, list[Example]]]]:
    """Data, tokenizer and a run that is ready to train (resume: at the point where it stopped)."""
    pairs, origin = load_pairs(config)
    for pair in pairs:  # a language that cannot be scored should fail now, not after training
        make_metrics(for_pair(config, pair))
    examples = {split: [e for splits in pairs.values() for e in splits[split]] for split in ("train", "valid")}
    config = replace(config, data=origin)  # so that eval.py and --resume find the same data
    torch.manual_seed(config.seed)
    pick_device(config.device)  # what cannot be had should fail before an earlier run is overwritten
    if resume:
        saved = load_checkpoint(config.folder / "last.pt", "state")
        model, tokenizer = EncoderDecoder(ModelConfig(**saved["model_config"])), load_tokenizer(config.folder)
        if model.config.vocab_size != tokenizer.get_vocab_size():
            raise UserError(f"{config.folder}/last.pt does not fit the tokenizer.json beside it")
    else:
        model, tokenizer = new_model(config, examples["train"])
    data = {}
    for split in ("train", "valid"):
        data[split] = encode_split(tokenizer, examples[split], config, split, scored=split != "train")
    if not data["train"].source:
        raise UserError(f"no training pair is as short as --max-tokens {config.max_tokens}: raise it")
    if not resume:
        if rank() == 0:
            new_folder(config)
        write_text(config.folder / "tokenizer.json", tokenizer.to_str())
        write_text(config.folder / "config.json", json.dumps(asdict(config), indent=1))
    run = Run(config, examples, data, tokenizer, model)
    if not resume:
        run.save()
    if resume or rank():  # all start from what rank 0 wrote: the same weights, and checked for the same data
        run.resume(saved if resume else load_checkpoint(config.folder / "last.pt", "state"))
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"model: {config.init or config.size}, {parameters / 1e6:.2f} M parameters, "
          f"vocabulary {model.config.vocab_size}, on {run.device}; {len(data['train'].source)} training pairs; "
          f"run folder {config.folder}")
    needs = memory_estimate(config, model.config, parameters, data["train"])
    print(f"memory: about {' and '.join(f'{mib:,.0f} MiB for {stage}' for stage, mib in needs.items())}. Too much? Lower "
          "--batch-tokens and --policy-batch-tokens and raise --accumulate"
          + ", or add --recompute" * (not config.recompute))
    return run, tokenizer, pairs


def report(run: Run, tokenizer: Tokenizer, pairs: dict[str, dict[str, list[Example]]]) -> None:
    """Decode the test split with each stage's best checkpoint: a table and three examples a direction, results.json."""
    config, tables = run.config, {}
    stages = ["sft", *(["control"] if run.has_control else []), *(["policy"] if config.policy_steps else [])]
    results = {"task": config.task, "pair": config.pair, "data": config.data, "rows": [], "signature": {}}
    for pair, splits in pairs.items():
        one, split, rows = for_pair(config, pair), "test" if "test" in splits else "valid", []
        data = encode_split(tokenizer, splits[split], one, split)
        with tqdm(stages, desc=f"decoding {split}", unit="stage", leave=False, disable=rank() > 0) as bar:
            for stage in bar:
                rows.append(score_stage(config.folder, stage, one, tokenizer, splits[split], data, config.beams,
                                        run.device))
        print_table(rows, one, splits[split], split)
        print_examples(rows, splits[split])
        tables[pair] = rows
        results["rows"] += [{"pair": pair, "split": split} | row.to_json() for row in rows]
        results["signature"] |= {name + f" {pair}" * (len(pairs) > 1): text
                                 for name, text in signatures(one, splits[split]).items()}
    print_means(tables)
    write_text(config.folder / "results.json", json.dumps(results, indent=1))
    print(f"\nsaved {config.folder}/results.json. Score again, or translate: python eval.py {config.folder}")


def join_processes() -> None:
    """Under torchrun: meet the others, by NCCL between GPUs and by gloo else. Only rank 0 prints."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def main(argv: list[str] | None = None) -> int:
    config, resume = parse(sys.argv[1:] if argv is None else argv)
    try:
        join_processes()
        if resume:
            config = Config(**(vars(load_config(Path(resume))) | {"out": resume}))
        if config.threads:
            torch.set_num_threads(config.threads)
        run, tokenizer, pairs = prepare(config, bool(resume))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.interrupt)
        while run.state.stage != "done":
            run.train()
        for number in (signal.SIGINT, signal.SIGTERM):  # all is saved: leave at once
            signal.signal(number, signal.default_int_handler)
        report(run, tokenizer, pairs)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        if first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory. Start again with fewer --batch-tokens (SFT, its control) or --policy-batch-tokens "
              "(warmups) and as much more --accumulate, or with --recompute", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        folder = Path(resume) if resume else config.folder
        saved = (folder / "last.pt").exists()
        hint = f"go on with: python train.py --resume {folder}" if saved else "nothing was saved yet"
        if first_to_fail():
            print(f"\nstopped; {hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
