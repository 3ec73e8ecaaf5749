"""Train: SFT, then warmups by policy gradient, then SFT again with the same compute: the control.

    python train.py --task wmt                  everything on the built-in data, in minutes
    python train.py --resume runs/wmt           go on where a run was interrupted
    python train.py --sft runs/wmt …            begin with its SFT stage, at the policy stage
    torchrun --nproc_per_node 2 train.py …      by several processes: a GPU each, or CPUs

N processes take N times the batches. Divide --batch-tokens and --policy-batch-tokens by N for
updates of the same size.

A run folder holds config.json, tokenizer.json, log.jsonl, last.pt (all that --resume needs), the
best checkpoint of each stage by validation (sft.pt, policy.pt, control.pt), and results.json.

`run` is a Run, batch a warmup.Batch, spec a warmup.WarmupSpec. Other names are those of data.py.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from data import (
    AFTER_SFT,
    SEP,
    SPLITS,
    STAGES,
    TASKS,
    Batches,
    Config,
    Parser,
    add_flags,
    encode_split,
    flag_name,
    load,
    load_tokenizer,
    lookup,
    pretrained_tokenizer,
    program,
    progress_bar,
    prompt_tags,
    read_config,
    shell_word,
    special_ids,
    train_tokenizer,
)
from eval import (
    Output,
    Run as ScoredRun,
    compute_metrics,
    decode_split,
    means,
    print_table,
    read_log,
    resume_command,
    score_run,
    show,
    training_cost,
    units,
    validate,
    warmup_spec,
    what_is_lost,
)
from model import (
    PAD_ID,
    SIZES,
    EncoderDecoder,
    ModelConfig,
    UserError,
    compile_stacks,
    load_checkpoint,
    load_model,
    load_pretrained,
    low_precision,
    own_draws,
    precision,
    pretrained_folder,
    read_json,
    save_checkpoint,
    pick_device,
    write_file,
)
from warmup import sft_loss, target_tokens, warmup_loss


# ----------------------------------------------------------------------------- equal compute
# A forward pass takes 2 FLOPs for each parameter that meets a token, and in each layer 2·H·D for a
# token's score with each key, and as many to mix the values. Padding and masked keys count, because
# they are computed. What --recompute repeats does not. A backward pass takes two forward passes.
CROSS = "cross_attention.kv"  # of the decoder, but computed once per source token


def count(module, part=""):
    """How many parameters of a module have this part in their names."""
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


def encoder_flops(model, batch):
    """A forward pass over the sources, with the keys and values that the decoder sees of them."""
    B, S = batch.source.shape
    parameters = count(model.encoder) + count(model.decoder, CROSS)
    scores = 2 * model.config.inner * S * model.config.encoder_layers
    return 2 * B * S * (parameters + scores)


def decoder_flops(model, batch, tokens, length, predicted):
    """A forward pass over `tokens` tokens in rows of `length`.

    predicted: how many of them the output layer sees.
    """
    config = model.config
    parameters = count(model.decoder) - count(model.decoder, CROSS)
    keys = length + batch.source.size(1)
    scores = 2 * config.inner * keys * config.decoder_layers
    return 2 * (tokens * (parameters + scores) + predicted * config.width * config.vocab_size)


def sft_flops(model, batch):
    """An SFT update on a batch."""
    length = batch.prompt.size(1) + batch.target.size(1)
    predicted = int(target_tokens(batch))  # padding does not reach the output layer
    decoder = decoder_flops(model, batch, len(batch.source) * length, length, predicted)
    return 3 * (encoder_flops(model, batch) + decoder)


def policy_flops(model, batch, spec, rows, sampled):
    """A policy update. rows (B,): how many rows [start] prompt c <sep> y each example trains.

    sampled: warmups drawn for each example, forward only.
    """
    B = len(rows)
    W = spec.length
    N = int(rows.sum())
    prefix = 1 + batch.prompt.size(1)
    length = prefix + W + batch.target.size(1)
    real = (batch.target != PAD_ID).sum(1)  # (B,)
    predicted = int(rows @ real) + (0 if spec.pause else N * W)  # log P(c|x) is trained, too
    decoder = decoder_flops(model, batch, N * length, length, predicted)
    flops = 3 * (encoder_flops(model, batch) + decoder)
    # the prefix once, then token by token, in rows of prefix + W/2 on average. The last token of c
    # is drawn, but not read
    if sampled:
        tokens = B * prefix + B * sampled * (W - 1)
        flops += decoder_flops(model, batch, tokens, prefix + W // 2, B * sampled * W)
    return flops


# ----------------------------------------------------------------------------- the stages
@dataclass
class State:
    """Where a run stands. What its updates cost is in log.jsonl."""

    stage: str = "sft"
    step: int = 0  # updates done in this stage
    total: int = 0  # updates this stage will do
    validated: int = -1  # updates done at this stage's last validation
    best_nll: float = math.inf  # lowest of this stage's validations


@dataclass(kw_only=True)
class Run(ScoredRun):
    """One training run. `start_stage` sets what changes with the stage, the spec included."""

    examples: dict  # {split: [Example]}
    data: dict  # the same as token ids: train and valid
    checksum: int  # of the examples
    state: State = field(default_factory=State)
    batches: Batches | None = None
    optimizer: torch.optim.Optimizer | None = None
    shown: dict = field(default_factory=dict)  # numbers beside the progress bar
    stop: float = 0.0  # the time of Ctrl-C or SIGTERM: save after this update, and leave

    def interrupt(self, number, frame):
        """Ctrl-C and SIGTERM: finish the update, save, leave. A second Ctrl-C leaves at once.

        Signals within a second count as one: torchrun repeats what its processes have got already.
        """
        now = time.monotonic()
        if not self.stop:
            self.stop = now
        elif number == signal.SIGINT and now > self.stop + 1:
            raise KeyboardInterrupt(f"go on with: {resume_command(self.config.folder)}")


def train(run):
    """All stages in turn, from wherever the state stands."""
    config, stages = run.config, run.config.stages
    quiet = {"disable": True} if rank() else {}
    for stage in stages[stages.index(run.state.stage) :]:
        if stage != run.state.stage:
            start_stage(run, stage)
        state = run.state
        epochs = state.total * config.accumulate * processes() / len(run.batches.order)
        print(f"{stage}: {state.total} updates, {epochs:.2f} epochs")
        with progress_bar(stage, state.total, "update", initial=state.step, **quiet) as bar:
            train_stage(run, bar)
    save_state(run)  # the last validation, too


def start_stage(run, stage):
    """Fresh optimizer, batches and counters. Later stages begin at the best SFT weights.

    Two stages are our choice: the paper does not say how warmups are initialised. A policy from
    scratch would sample noise, and y would learn to ignore it. The control has what the
    policy stage has: its FLOPs, --policy-lr with a new ramp, no dropout in the decoder, as many
    validations (at most one an update). It lacks the warmup, and spends the FLOPs on batches of
    SFT's size: the best SFT that they buy.
    """
    config, folder = run.config, run.config.folder
    total, tokens = config.sft_steps, config.batch_tokens
    if stage == "policy":
        total, tokens = config.policy_steps, config.policy_batch_tokens
        if config.estimator in ("pause", "sft"):
            tokens *= config.samples  # as many target tokens as K samples would hold
    if stage == "control":  # as many SFT updates as cost what the policy stage cost
        sft, policy = training_cost(folder, "sft"), training_cost(folder, "policy")
        total = max(1, round(policy["flops"] / (sft["flops"] / sft["updates"])))
    if stage != "sft":
        run.model.load_state_dict(load_checkpoint(folder / "sft.pt")["model"])
    run.state = State(stage, total=total)
    run.spec = warmup_spec(stage, config, run.tokenizer)
    run.batches = Batches(run.data["train"], tokens, config.seed, rank(), processes())
    run.optimizer = make_optimizer(run.model, config.weight_decay)


def learning_rate(config, state):
    """Linear up over lr_rampup_steps (at most a quarter of the stage), then down towards 0."""
    peak = config.lr if state.stage == "sft" else config.policy_lr
    ramp = min(config.lr_rampup_steps, state.total // 4)
    rise = (state.step + 1) / (ramp + 1)
    fall = (state.total - state.step) / (state.total - ramp)
    return peak * min(rise, fall)


def batch_loss(run, batch):
    """A micro-batch -> loss, {(name, unit): sum}, {unit: count}.

    The loss is the stage's, a sum over target tokens. FLOPs are one of the counts. All sums and
    counts add up over micro-batches and processes.
    """
    config, spec, model = run.config, run.spec, run.model
    here = batch.to(run.device)
    if run.state.stage != "sft":  # baselines and control, too: no gain may come from dropout
        model.decoder.eval()  # see warmup_loss: decoder dropout is off-policy
    if spec is None:
        loss = sft_loss(model, here)
        sums = {}
        flops = sft_flops(model, batch)
    else:
        loss, sums, rows, sampled = warmup_loss(
            model, here, spec, config.estimator, config.samples, config.alpha
        )
        flops = policy_flops(model, batch, spec, rows, sampled)
    sums["loss", "token"] = loss.detach()
    return loss, sums, units(batch) | {"flops": flops}


def train_stage(run, bar):
    """The updates of one stage: THE training loop.

    UserError if the gradient is not finite. KeyboardInterrupt after Ctrl-C, once all is saved.
    """
    config, state, model, optimizer = run.config, run.state, run.model, run.optimizer
    if validation_is_due(config, state):  # a later stage begins, or a run was stopped in it
        validate_and_save(run)
    while state.step < state.total:
        started = time.perf_counter()
        model.train()
        rate = learning_rate(config, state)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # -- the step: gradient of all processes' summed losses / all their target tokens
        micro_batches = [next(run.batches) for _ in range(config.accumulate)]
        tokens = sum(int(target_tokens(batch)) for batch in micro_batches)
        tokens = sum(gather(tokens))
        sums, counts = Counter(), Counter()
        # dropout and warmups depend on the update alone: a resumed run draws the same
        with own_draws(run.device, config.seed, state.stage, rank(), state.step):
            for batch in micro_batches:
                with precision(config.dtype, run.device):
                    loss, some_sums, some_counts = batch_loss(run, batch)
                (loss / tokens).backward()
                sums.update(some_sums)
                counts.update(some_counts)
        sum_gradients(model)
        norm = clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        # -- end of the step

        sums["grad_norm", "process"] = norm  # all processes have the same
        counts["process"] = 1
        record = summary(sums, counts)
        if not math.isfinite(record["grad_norm"]):  # the weights are spoilt, but last.pt is not
            flag = "--lr" if state.stage == "sft" else "--policy-lr"
            raise UserError(f"the gradient became {record['grad_norm']}: start again, lower {flag}")
        state.step += 1
        log(run, "train", record | {"lr": rate, "seconds": time.perf_counter() - started})
        progress(run, bar)
        if any(gather(run.stop)):
            save_state(run)
            raise KeyboardInterrupt(f"go on with: {resume_command(config.folder)}")
        if validation_is_due(config, state):
            validate_and_save(run)


# ===== plumbing: validation and saving, resuming, the log, processes, the program
def validation_is_due(config, state):
    """Before the first update of later stages, after each --eval-every updates, at a stage's end.

    The control has another number of updates than the policy stage, but as many validations (at
    most one an update), at even distances: as many checkpoints to choose from.
    """
    step, total = state.step, state.total
    if step == state.validated:
        return False
    if step == 0:
        return state.stage != "sft"
    if state.stage != "control":
        return step % config.eval_every == 0 or step == total
    validations = math.ceil(config.policy_steps / config.eval_every)
    return step * validations // total > (step - 1) * validations // total


def validate_and_save(run):
    """Save the state; validate; keep the weights if they are the stage's best. By rank 0.

    The state comes first: a cluster kills half a minute after SIGTERM, and a validation may take
    longer. A run that was stopped there validates on resuming.
    The best is by likelihood, not by a metric: every task has one, and every stage raises one.
    """
    config, state = run.config, run.state
    save_state(run)
    if rank() == 0:
        numbers = validate(run, run.data["valid"])
        if run.spec and state.step == 0 and "swap_gap" not in numbers:
            print("note: a batch holds one example, so there is no swap_gap: lower --eval-samples")
        if count := config.eval_decode:
            outputs = decode_split(run, run.data["valid"][:count])
            numbers |= compute_metrics(config, run.examples["valid"][:count], outputs)
        if numbers["nll"] < state.best_nll:
            state.best_nll = numbers["nll"]
            save_checkpoint(config.folder / f"{state.stage}.pt", run.model)
        log(run, "valid", numbers)
    state.best_nll = gather(state.best_nll)[0]  # the others wait here
    state.validated = state.step


def save_state(run):
    """last.pt: all that the next update depends on. By rank 0.

    log_bytes says how much of log.jsonl belongs to it. What came later is cut off on resuming.
    """
    if rank():
        return
    save_checkpoint(
        run.config.folder / "last.pt",
        run.model,
        state=asdict(run.state),
        settings=asdict(run.config),
        optimizer=run.optimizer.state_dict(),
        batches=(run.batches.epoch, run.batches.position),
        checksum=run.checksum,
        log_bytes=(run.config.folder / "log.jsonl").stat().st_size,
    )


def restore(run):
    """Take up last.pt: weights, optimizer, and the place in the order of the data.

    Random draws need no state: each update has a seed of its own. So on a CPU the next update is
    the same bit for bit, if as many processes take part.
    UserError if the data or the log is not that of the run.
    """
    config = run.config
    saved = load_checkpoint(config.folder / "last.pt", "state")
    if run.checksum != saved["checksum"]:
        raise UserError(f"the data in {config.data} is not what this run was trained on")
    for name, theirs in saved["settings"].items():
        ours = getattr(config, name)
        if ours != theirs and name not in ("out", *MOVABLE):
            differ = f"config.json has {flag_name(name)} {ours}, last.pt {theirs}"
            raise UserError(f"{config.folder}: {differ}. They may not change on resuming")
    state = State(**saved["state"])
    log_file = config.folder / "log.jsonl"
    if not log_file.exists() or log_file.stat().st_size < saved["log_bytes"]:
        raise UserError(f"{log_file} is incomplete: bring it back, or start a new run")
    if rank() == 0:  # forget what came after the checkpoint
        os.truncate(log_file, saved["log_bytes"])
    gather(None)  # the others read the log only now

    start_stage(run, state.stage)
    run.state = state
    # seek shuffles the data again: seed and epoch fix the order, the position says where we stand
    run.batches.seek(*saved["batches"])
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])


def checksum(examples):
    """A number that changes with any text that training or validation reads."""
    return zlib.crc32(json.dumps([examples["train"], examples["valid"]]).encode())


def summary(sums, counts):
    """This process's sums and counts of an update -> means and FLOPs over all, for log.jsonl."""
    numbers = torch.stack([*sums.values()]).tolist()  # in one transfer
    all_sums, all_counts = Counter(), Counter()
    for sums_there, counts_there in gather((dict(zip(sums, numbers)), counts)):
        all_sums.update(sums_there)
        all_counts.update(counts_there)
    return means(all_sums, all_counts) | {"flops": all_counts["flops"]}


def log(run, kind, numbers):
    """Append a line to log.jsonl. By rank 0. docs/guide.md explains its numbers."""
    path = run.config.folder / "log.jsonl"
    line = {"kind": kind, "stage": run.state.stage, "step": run.state.step} | numbers
    run.shown |= numbers
    if rank():
        return
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def progress(run, bar):
    """Move the bar by an update, and show the numbers that say whether it works."""
    names = ("nll", "spread", "swap_gap") if run.spec else ("loss",)
    numbers = {name: f"{run.shown[name]:.2f}" for name in names if name in run.shown}
    bar.set_postfix(numbers, refresh=False)
    bar.update()


def make_optimizer(model, weight_decay):
    """AdamW. Matrices are decayed; gains and position biases are not.

    Our choice: the paper does not name its optimizer. β₂ = 0.98 and ε = 1e-9 are those of Vaswani
    et al. §5.3, because our stages are short.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        decayed = p.dim() == 2 and "biases" not in name
        (matrices if decayed else others).append(p)
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


# ----------------------------------------------------------------------------- processes
# Under torchrun N processes run this program, each on its share of the batches. They meet in
# `gather` and `sum_gradients`, which all must call in the same order. Rank 0 validates, decodes and
# writes while the others wait.


def processes():
    """How many there are. 1: no torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(thing) -> list:
    """The `thing` of every process, by rank. All wait here for the slowest."""
    everyone = [thing] * processes()
    if processes() > 1:
        dist.all_gather_object(everyone, thing)
    return everyone


def sum_gradients(model):
    """Every gradient, summed over the processes, in one message. DDP sends while it computes."""
    if processes() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        together = parameters_to_vector(gradients)
        dist.all_reduce(together)
        vector_to_parameters(together, gradients)


def join_processes():
    """Under torchrun: meet the others, by NCCL between GPUs and by gloo else. Rank 0 prints.

    UserError if this is one of several processes that nobody joins.
    """
    if dist.is_torchelastic_launched():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # long: the others wait while rank 0 validates and decodes
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "WORLD_SIZE is set, but torchrun did not start this: use torchrun, or unset WORLD_SIZE"
        )
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


# ----------------------------------------------------------------------------- the program
MOVABLE = ("device", "threads", "data")  # the settings that may change when a run moves


def parse(argv):
    """The config, and whether it resumes a run. Exits with code 2 on bad usage.

    --help shows the defaults of the task that stands beside it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--init", "--resume", "--sft", "--size", "--vocab-size"):  # see below
        first.add_argument(name, nargs="?")
    known, _ = first.parse_known_args(argv)
    defaults = asdict(Config())
    task = TASKS.get(known.task, TASKS["wmt"])
    for name in task.settings:
        lookup(defaults, name, f"task {known.task}: there is no setting")
    defaults |= task.settings
    if known.init:  # T5's weights are large and need no big steps
        defaults |= {"lr": 3e-4, "policy_lr": 1e-4}
    of_sft = {}  # with --sft: the settings of that run. Those that are not said again stay
    if known.sft:
        of_sft = vars(read_config(known.sft))
        defaults |= of_sft | {"out": "", "overwrite": False, "sft": ""}

    parser = Parser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = f"go on with this run folder and its settings; only --{', --'.join(MOVABLE)} may change"
    parser.add_argument("--resume", metavar="RUN", help=text)
    if known.resume is not None:
        defaults = dict.fromkeys(defaults, argparse.SUPPRESS)
    add_flags(parser, defaults)
    args = vars(parser.parse_args(argv))
    folder = args.pop("resume")
    for name in args:
        if folder is not None and name not in MOVABLE:
            parser.error(
                f"{flag_name(name)} may not change on resuming: --sft RUN starts a new run from "
                "its SFT stage, if that does not depend on it"
            )
    start = Config() if folder is None else read_config(folder)
    config = replace(start, **args)
    if wrong := config.problem():
        parser.error(wrong)
    if known.init and (known.size or known.vocab_size):
        parser.error("--init brings its own size and vocabulary: leave --size, --vocab-size out")
    for name, theirs in of_sft.items():
        ours = getattr(config, name)
        if ours != theirs and name not in (*AFTER_SFT, "data"):  # data: see check_sft
            parser.error(
                f"the SFT stage of {known.sft} has {flag_name(name)} {theirs!r}, not {ours!r}: "
                "leave it out, or train from the start"
            )
    if known.sft and config.folder.resolve() == Path(config.sft).resolve():
        parser.error("--sft and --out are one folder: choose another --out")
    return config, folder is not None


def earlier_files(folder):
    """The files of an earlier run in a folder. Others are not this program's: they stay."""
    names = "config.json tokenizer.json log.jsonl results.json last.pt".split()
    names += [f"{stage}.pt" for stage in STAGES]
    for split in SPLITS:  # eval.py's
        names += [f"{split}.{part}.txt" for part in ("ref", *STAGES, "policy.warmups")]
    return [folder / name for name in names if (folder / name).exists()]


def check_folder(config, resume):
    """UserError if the folder holds a run that may not be replaced, or files that are no run's."""
    earlier = earlier_files(config.folder)
    settings, tokenizer = config.folder / "config.json", config.folder / "tokenizer.json"
    if settings in earlier and "task" not in read_json(settings):
        raise UserError(f"{settings} is not a run's, and would be lost: choose another --out")
    # a run that was killed while it was prepared has these two, and an empty log: no loss
    worth = [path for path in earlier if path not in (settings, tokenizer) and path.stat().st_size]
    if worth and not (resume or config.overwrite):
        raise UserError(
            f"{config.folder} holds a run ({worth[0].name}): --resume it, --overwrite it, or "
            "choose another --out"
        )


def first_model(config, examples, resume):
    """A model and its tokenizer: of last.pt, of another run's SFT, pretrained, or from scratch.

    UserError if the weights cannot be loaded.
    """
    if resume or config.sft:
        folder = config.folder if resume else Path(config.sft)
        tokenizer = load_tokenizer(folder / "tokenizer.json", SEP)
        model = load_model(folder / ("last.pt" if resume else "sft.pt"), tokenizer, "cpu")
    elif config.init:
        folder = pretrained_folder(config.init)
        model = load_pretrained(folder, dropout=config.dropout)
        tokenizer = pretrained_tokenizer(folder, prompt_tags(examples), model.config.vocab_size)
    else:
        tokenizer = train_tokenizer(examples, config.vocab_size)
        sizes = SIZES[config.size]
        model = EncoderDecoder(
            ModelConfig(tokenizer.get_vocab_size(), dropout=config.dropout, **sizes)
        )
    return model, tokenizer


MOST_ROWS = 4096  # of an update with `exact`: on a CPU core the toy takes 0.2 s for so many


def check_rows(config, tokenizer, data):
    """UserError if `exact` would take hours: an update scores all warmups of all its examples."""
    tokens = tokenizer.get_vocab_size() - len(special_ids(tokenizer))
    warmups = tokens**config.warmup_len
    batches = Batches(data, config.policy_batch_tokens, config.seed).order
    rows = warmups * max(map(len, batches)) * config.accumulate
    if rows <= MOST_ROWS:
        return
    how = "--warmup-len, --vocab-size or --accumulate"
    if warmups * config.accumulate <= MOST_ROWS:
        how = f"--policy-batch-tokens to {config.policy_batch_tokens * MOST_ROWS // rows}"
    raise UserError(
        f"--estimator exact would score {rows:,} rows an update, {warmups:,} warmups for each "
        f"example. At most {MOST_ROWS:,} are feasible: lower {how}"
    )


def check_sft(config, checksum):
    """UserError if another run's SFT stage is not finished, or was trained on other data."""
    folder = Path(config.sft)
    saved = load_checkpoint(folder / "last.pt", "state")
    validated = [
        r["step"] for r in read_log(folder) if r["stage"] == "sft" and r["kind"] == "valid"
    ]
    finished = config.sft_steps in validated
    if not finished or training_cost(folder, "sft")["updates"] != config.sft_steps:
        raise UserError(f"--sft: SFT is not finished there. Go on with: {resume_command(folder)}")
    if saved["checksum"] != checksum:
        raise UserError(f"--sft {folder}: its data was not that in {config.data}")


def prepare(config, resume) -> Run:
    """A run that is ready to train. resume: from where it stopped.

    All that can fail fails here, before an earlier run is overwritten and before hours are spent.
    """
    check_folder(config, resume)
    splits, origin = load(config)
    config = replace(config, data=origin)  # so that eval.py and --resume find the same data
    device = pick_device(config.device, config.threads)
    data_checksum = checksum(splits)
    if config.sft and not resume:
        check_sft(config, data_checksum)
    with own_draws(device, config.seed, "weights"):
        model, tokenizer = first_model(config, splits["train"], resume)
    scored = splits.get("test", splits["valid"])
    some = scored[:8]
    for warmup in ("", "some words"):  # a metric that fails should fail now
        compute_metrics(config, some, [Output(example.target, warmup) for example in some])

    data = {
        "train": encode_split(tokenizer, splits["train"], config, "train", scored=False),
        "valid": encode_split(tokenizer, splits["valid"], config, "valid"),
    }
    if not data["train"]:
        raise UserError(
            "all training pairs are too long: raise --max-source-tokens or --max-target-tokens"
        )
    if config.estimator == "exact" and config.policy_steps:
        check_rows(config, tokenizer, data["train"])
    if lost := what_is_lost(tokenizer, scored, config):
        print(f"data: {lost}")

    run = Run(
        config,
        tokenizer,
        device,
        model.to(device),
        examples=splits,
        data=data,
        checksum=data_checksum,
    )
    model.encoder.recompute = model.decoder.recompute = config.recompute
    if config.compile:
        compile_stacks(model)
    begin(run, resume)
    size = count(model) / 1e6
    number_format = "bfloat16" if low_precision(config.dtype, device) else "float32"
    print(
        f"model: {config.init or config.size}, {size:.2f} M parameters, vocabulary "
        f"{model.config.vocab_size}, on {device} in {number_format}; {len(data['train'])} "
        "training pairs"
    )
    return run


def begin(run, resume):
    """Start from last.pt: that of an earlier session, or one that is written here.

    So the processes of a new run have the same weights, and each run begins as a resumed one.
    """
    config = run.config
    if len(set(gather(run.checksum))) > 1:
        raise UserError("the processes of this job do not read the same data")
    if not resume:
        if rank() == 0:
            for path in earlier_files(config.folder):
                path.unlink()
            config.folder.mkdir(parents=True, exist_ok=True)
            run.tokenizer.save(str(config.folder / "tokenizer.json"))
            (config.folder / "log.jsonl").touch()
            if config.sft:  # as if this run had trained it
                save_checkpoint(config.folder / "sft.pt", run.model)
                for record in read_log(Path(config.sft)):
                    if record["stage"] == "sft":
                        log(run, record["kind"], record)
            start_stage(run, "policy" if config.sft else "sft")
            write_json(config.folder / "config.json", asdict(config))
            save_state(run)  # last: with it the run can be resumed
        gather(None)  # the others wait for last.pt
    restore(run)
    if rank() == 0:  # again, and only now: what --resume changed is known to be good
        write_json(config.folder / "config.json", asdict(config))


def write_json(path, content):
    """Write a file as a whole or not at all: it may be read while the run goes on."""
    text = json.dumps(content, indent=1)
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def report(run):
    """Score the test split with each stage's best checkpoint: the table, and results.json."""
    config, splits = run.config, run.examples
    split = "test" if "test" in splits else "valid"
    examples = splits[split]
    results, _ = score_run(run, config.stages, examples, split)
    packages = ("torch", "numpy", "tokenizers", "sacrebleu", "rouge-score")
    results |= {
        "config": asdict(config),
        "data_checksum": run.checksum,
        "device": str(run.device),
        "processes": processes(),
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
    }
    path = config.folder / "results.json"
    write_json(path, results)  # first: a reader such as `head` may leave
    print_table(results, config, len(examples))
    show(run, config.stages, examples[:3])
    print(f"\nsaved {path}. Score again: python eval.py {shell_word(config.folder)}")


@contextmanager
def alone_in(folder):
    """One program at a time in a run folder. UserError for the second. By rank 0.

    The lock ends with the process, whatever ends it. A folder that stays empty is removed.
    """
    from filelock import FileLock, Timeout  # comes with torch

    if rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another program works in {folder}: choose another --out") from None
    try:
        yield
    finally:
        if [*folder.iterdir()] == [folder / "lock"]:
            with suppress(OSError):  # Windows keeps what is open
                (folder / "lock").unlink()
                folder.rmdir()
        lock.release()


@contextmanager
def signals_to(handler):
    """Within, Ctrl-C and SIGTERM call this. In a thread Python allows no handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@program
def main(argv):
    """The program: prepare, train, report. Ctrl-C and SIGTERM finish the update and save."""
    config, resume = parse(argv)
    join_processes()
    with alone_in(config.folder):
        run = prepare(config, resume)
        with signals_to(run.interrupt):
            train(run)
            run.stop = -math.inf  # all is saved: Ctrl-C leaves at once
            if rank() == 0:
                report(run)
    gather(None)
    if dist.is_initialized():
        time.sleep(0.2)  # torch 2.6 hangs while gloo's threads still free the last message
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
