"""Train: SFT, then warmups by policy gradient, then SFT again with the same compute: the control.

    python train.py --task wmt                  everything on the built-in sample, in minutes
    python train.py --resume runs/wmt           go on where a run was interrupted
    torchrun --nproc_per_node 2 train.py …      the same by several processes: a GPU each, or CPUs

A run folder holds config.json, tokenizer.json, log.jsonl, last.pt (all that --resume needs), the
best checkpoint of each stage by validation (sft.pt, policy.pt, control.pt), and results.json.
"""

import argparse, difflib, json, math, os, signal, sys, time, zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import (
    READERS,
    SAMPLES,
    TASKS,
    Batches,
    Encoded,
    Example,
    Task,
    encode_split,
    load,
    load_tokenizer,
    pretrained_tokenizer,
    prompt_tags,
    special_ids,
    train_tokenizer,
)
from eval import (
    BASELINES,
    FORMAT,
    METRICS,
    STAGES,
    Settings,
    averages,
    ceiling,
    decode_and_score,
    flag,
    flag_name,
    load_checkpoint,
    load_model,
    print_table,
    read_settings,
    resume_command,
    score_run,
    show,
    signatures,
    training_cost,
    translation_metrics,
    validate,
    warmup_spec,
    what_is_lost,
)
from model import (
    SIZES,
    EncoderDecoder,
    ModelConfig,
    Parser,
    UserError,
    compile_stacks,
    load_pretrained,
    one_line,
    pick_device,
    precision,
    pretrained_folder,
    program,
    shell_word,
)
from warmup import Batch, sft_loss, target_tokens, warmup_loss

MOVABLE = ("device", "threads", "data")  # the settings that may change when a run moves


@dataclass(frozen=True)
class Config(Settings):
    """Every setting of a run, beside eval.Settings: what scoring reads, too. Saved as JSON.

    Each field is a flag (--sft-steps for sft_steps)."""

    out: str = flag("", "run folder; default: runs/TASK")
    overwrite: bool = flag(False, "replace an earlier run in the same folder")
    # model
    size: str = flag("tiny", "of a model from scratch", choices=SIZES)
    vocab_size: int = flag(4000, "most tokens in a vocabulary from scratch", 300, 10**6)
    dropout: float = flag(0.1, "probability of dropping an activation", 0, 0.99)
    recompute: bool = flag(False, "compute activations again in the backward pass: less memory")
    compile: bool = flag(False, "torch.compile of encoder and decoder: minutes at first")
    # optimisation
    sft_steps: int = flag(300, "updates of the SFT stage", 1, 10**9)
    policy_steps: int = flag(120, "updates of the policy stage; 0: SFT only", 0, 10**9)
    control: bool = flag(True, "afterwards SFT again, for the policy stage's FLOPs")
    policy_batch_tokens: int = flag(1500, "in the policy stage; K samples count once", 16, 10**9)
    accumulate: int = flag(1, "micro-batches per update, of each process", 1, 10**6)
    lr: float = flag(3e-3, "peak learning rate of SFT", 1e-12, 10)
    policy_lr: float = flag(1e-3, "peak learning rate of policy stage and control", 1e-12, 10)
    lr_rampup_steps: int = flag(100, "updates of linear rise, at most 1/4 of a stage", 0, 10**9)
    weight_decay: float = flag(0.01, "AdamW's decay of weight matrices", 0, 100)
    clip: float = flag(1.0, "largest norm of the gradient", 1e-9, 1e9)
    entropy_bonus: float = flag(0.0, "weight of the entropy (nats), falling to 0", 0, 1e6)
    eval_every: int = flag(100, "updates between validations; each saves last.pt", 1, 10**9)
    eval_decode: int = flag(0, "validation examples to decode at each validation", 0, 10**9)

    def problem(self) -> str:
        if wrong := super().problem():
            return wrong
        if self.entropy_bonus and self.estimator in ("exact", *BASELINES):
            return f"--entropy-bonus has no place in --estimator {self.estimator}: leave it out"
        compares = self.estimator not in ("best", "exact", *BASELINES) or self.entropy_bonus
        if compares and self.samples < 2 and self.policy_steps:
            return f"--estimator {self.estimator} compares warmups: --samples must be at least 2"
        return ""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.task}")

    @property
    def stages(self) -> list[str]:
        later = ["policy", "control"] if self.control else ["policy"]
        return ["sft", *later] if self.policy_steps else ["sft"]


# ----------------------------------------------------------------------------- equal compute
def update_flops(
    model: ModelConfig,
    batch: Batch,
    computed: torch.Tensor | None = None,
    W: int = 0,
    *,
    drawn: int = 0,
    scored=False,
) -> int:
    """FLOPs of the matrix products of one update on a batch, padding included.

    A product of sizes (i,j) and (j,k) takes 2·i·j·k. A backward pass costs two forward passes.
    computed (B,): trained rows [start] prompt c <sep> y of each example; None: SFT. drawn: warmups
    sampled for each example, forward only. scored: log P(c|x) is trained, too. What --recompute
    repeats is not counted."""
    B, S = batch.source.shape
    P, T = batch.prompt.size(1), batch.target.size(1)
    E, inner = model.width, model.inner
    ff = E * model.ff * (3 if model.gated else 2)
    head = 2 * E * model.vocab_size  # of the output layer, for one token
    real = (batch.target != model.pad_id).sum(1)  # (B,): padding does not reach the output layer

    def decode(rows: int, tokens: float, keys: float) -> float:
        """keys: decoder tokens that a token attends to, on average."""
        per_layer = 6 * E * inner + ff + 2 * inner * (keys + S)
        return 2 * rows * tokens * model.decoder_layers * per_layer

    encode = 2 * B * S * model.encoder_layers * (4 * E * inner + ff + 2 * inner * S)
    encode += 2 * B * S * model.decoder_layers * 2 * E * inner  # cross keys and values
    if computed is None:
        return round(3 * (encode + decode(B, P + T, P + T) + head * int(real.sum())))
    rows, length = int(computed.sum()), P + W + 1 + T
    flops = 3 * (encode + decode(rows, length, length) + head * int(computed @ real))
    if scored:
        flops += 3 * head * rows * W
    if drawn:  # the prefix once, then one token at a time
        flops += decode(B, 1 + P, 1 + P) + decode(B * drawn, W - 1, 1 + P + W / 2)
        flops += head * B * drawn * W
    return round(flops)


# ----------------------------------------------------------------------------- training
@dataclass
class State:
    """Where a run stands. What its updates cost is in log.jsonl."""

    stage: str = "sft"
    step: int = 0  # updates done in this stage
    total: int = 0  # updates this stage will do
    best: float = math.inf  # lowest validation NLL of this stage


class Run:
    """Model, data and state of one training run."""

    def __init__(
        self,
        config: Config,
        examples: dict[str, list[Example]],
        data: dict[str, Encoded],
        tokenizer: Tokenizer,
        model: EncoderDecoder,
    ):
        self.config, self.data, self.examples, self.tokenizer = config, data, examples, tokenizer
        self.folder = config.folder
        self.checksum = checksum(examples, data)
        self.device = pick_device(config.device)
        if config.recompute and config.dropout and self.device.type == "mps":
            raise UserError("--recompute on mps would draw other dropout masks: add --dropout 0")
        self.model = model.to(self.device)
        self.model.encoder.recompute = self.model.decoder.recompute = config.recompute
        if config.compile:
            compile_stacks(self.model)
        self.state, self.stop = State(), False
        self.start_stage("sft")

    def train(self) -> None:
        """All stages in turn, from wherever the state stands."""
        config, stages = self.config, self.config.stages
        begun = stages.index(self.state.stage)
        updates = [config.sft_steps, config.policy_steps, 2 * config.policy_steps]  # last: a guess
        with tqdm(
            total=sum(updates[: len(stages)]),
            initial=sum(updates[:begun]) + self.state.step,
            unit="update",
            mininterval=1,
            dynamic_ncols=True,
            disable=rank() > 0,
        ) as bar:
            for number, stage in enumerate(stages[begun:], begun):
                if stage != self.state.stage:
                    self.start_stage(stage)
                updates[number] = self.state.total
                bar.total = sum(updates[: len(stages)])
                bar.set_postfix()  # no numbers of another stage
                bar.set_description(stage)
                self.train_stage(bar)

    def start_stage(self, stage: str) -> None:
        """Fresh optimizer, batches and counters. Later stages begin at the best SFT weights."""
        config = self.config
        total = config.policy_steps if stage == "policy" else config.sft_steps
        if stage == "control":  # as many SFT updates as cost what the policy stage cost
            sft, policy = training_cost(self.folder, "sft"), training_cost(self.folder, "policy")
            total = max(1, round(policy["flops"] / (sft["flops"] / sft["updates"])))
        if stage != "sft":
            best = load_model(self.folder / "sft.pt", self.tokenizer, "cpu")
            self.model.load_state_dict(best.state_dict())
        tokens = config.policy_batch_tokens if stage == "policy" else config.batch_tokens
        if stage == "policy" and config.estimator in ("pause", "sft"):
            tokens *= config.samples  # as many target tokens as K samples would hold
        self.state, self.latest = State(stage, total=total), {}
        self.spec = warmup_spec(stage, config, self.tokenizer)
        self.batches = Batches(self.data["train"], tokens, config.seed, rank(), processes())
        self.optimizer = make_optimizer(self.model, config.weight_decay)

    def interrupt(self, *_) -> None:
        """Ctrl-C: finish the update, save, leave. A second one leaves at once."""
        if self.stop:
            raise KeyboardInterrupt(f"go on with: {resume_command(self.folder)}")
        self.stop = True

    def learning_rate(self) -> float:
        """Linear up over lr_rampup_steps (at most a quarter of the stage), then down towards 0."""
        config, state = self.config, self.state
        peak = config.lr if state.stage == "sft" else config.policy_lr
        ramp = min(config.lr_rampup_steps, state.total // 4)
        rise = (state.step + 1) / (ramp + 1)
        fall = (state.total - state.step) / (state.total - ramp)
        return peak * min(rise, fall)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        """The stage's loss of a micro-batch, a sum over target tokens; FLOPs and diagnostics."""
        config, state, spec, model = self.config, self.state, self.spec, self.model
        here = batch.to(self.device)  # FLOPs are counted on the CPU: no waiting for a GPU
        if state.stage == "policy":  # baselines, too: they differ in the warmup alone
            model.decoder.eval()  # see warmup_loss: decoder dropout is off-policy
        if spec is None:
            return sft_loss(model, here), {"flops": update_flops(model.config, batch)}
        # pause: a constant c, so there is nothing to sample, to compare or to improve
        estimator, K = ("frozen", 1) if spec.pause else (config.estimator, config.samples)
        bonus = config.entropy_bonus * (1 - state.step / state.total)
        loss, numbers = warmup_loss(
            model, here, spec, estimator, K, alpha=config.alpha, entropy_bonus=bonus
        )
        drawn = 0 if spec.pause or estimator == "exact" else K
        numbers["flops"] = update_flops(
            model.config,
            batch,
            numbers.pop("computed"),
            spec.length,
            drawn=drawn,
            scored=not spec.pause,
        )
        return loss, numbers

    def train_stage(self, bar: tqdm) -> None:
        """The updates of one stage: THE training loop."""
        config, state = self.config, self.state
        if state.step == 0 and state.stage != "sft" and state.best == math.inf:
            validate_and_save(self)  # where the stage begins: the best SFT weights
        while state.step < state.total:
            started = time.perf_counter()
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            # -- the step: gradient of all processes' summed losses / all their target tokens
            micro_batches = [next(self.batches) for _ in range(config.accumulate)]
            tokens = sum(target_tokens(self.model, batch) for batch in micro_batches)
            tokens = int(add_up(tokens))
            sums = {}
            for batch in micro_batches:
                with precision(config.dtype, self.device):
                    loss, numbers = self.loss(batch)
                (loss / tokens).backward()
                numbers |= {"loss": loss.detach(), "examples": len(batch.source)}
                sums = {name: sums.get(name, 0) + value for name, value in numbers.items()}
            sum_gradients(self.model)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            # -- end of the step

            sums = gather_sums(sums | {"grad_norm": norm / processes()})  # all have the same norm
            norm = sums.pop("grad_norm")
            if not math.isfinite(norm):  # the weights are spoilt, but last.pt is not
                rate = "--lr" if state.stage == "sft" else "--policy-lr"
                raise UserError(f"the gradient became {norm}: start again, lower {rate}")
            record = {
                "flops": sums.pop("flops"),
                "grad_norm": norm,
                "lr": self.learning_rate(),
                "seconds": time.perf_counter() - started,
            }
            record |= averages(sums, sums.pop("examples"), tokens)
            state.step += 1
            log(self, "train", record)
            shown = ("nll", "spread", "swap_gap") if self.spec else ("loss",)
            bar.set_postfix(
                {name: f"{self.latest[name]:.2f}" for name in shown if name in self.latest},
                refresh=False,
            )
            bar.update()
            if state.step % config.eval_every == 0 or state.step == state.total:
                validate_and_save(self)
            if any(gather(self.stop)):
                save_state(self)
                raise KeyboardInterrupt(f"go on with: {resume_command(self.folder)}")


# ===== plumbing: checkpoints and files, optimizer, processes, the program
def validate_and_save(run: Run) -> None:
    """Validate; keep the weights if they are the stage's best; save the state. By rank 0."""
    config, state = run.config, run.state
    if rank() == 0:
        numbers = validate(run.model, run.data["valid"], config, run.spec)
        if config.eval_decode:
            texts = run.examples["valid"][: config.eval_decode]
            data = Encoded(*(column[: config.eval_decode] for column in run.data["valid"]))
            scores, _ = decode_and_score(run.model, run.tokenizer, data, texts, config, run.spec)
            numbers |= scores
        log(run, "valid", numbers)
        if numbers["nll"] < state.best:
            state.best = numbers["nll"]
            write_checkpoint(
                run.folder / f"{state.stage}.pt",
                "stage",
                best_step=state.step,
                valid_nll=state.best,
                model=run.model.state_dict(),
                model_config=asdict(run.model.config),
            )
    state.best = gather(state.best)[0]  # the others wait here
    save_state(run)


def save_state(run: Run) -> None:
    """last.pt: everything that the next update depends on. By rank 0."""
    if rank():
        return
    log_file = run.folder / "log.jsonl"
    write_checkpoint(
        run.folder / "last.pt",
        "state",
        state=asdict(run.state),
        model=run.model.state_dict(),
        model_config=asdict(run.model.config),
        optimizer=run.optimizer.state_dict(),
        batches=(run.batches.epoch, run.batches.position),
        random=torch.get_rng_state(),
        data=run.checksum,
        log_bytes=log_file.stat().st_size if log_file.exists() else 0,
    )


def checksum(examples: dict[str, list[Example]], data: dict[str, Encoded]) -> int:
    """A number that changes with any text or token id that training or validation reads."""
    crc = 0
    for split, columns in data.items():
        for example in examples[split]:
            crc = zlib.crc32(json.dumps(example).encode(), crc)
        for column in columns:
            crc = zlib.crc32(np.concatenate(column), crc)
    return crc


def restore(run: Run) -> None:
    """Take up last.pt. On a CPU, by one process, the next update is then the same bit for bit.

    On a GPU, and in the processes other than rank 0, dropout and warmups are drawn anew."""
    saved = load_checkpoint(run.folder / "last.pt", "state")
    if any(number != saved["data"] for number in gather(run.checksum)):
        raise UserError(f"the data in {run.config.data} is not what this run was trained on")
    if saved["state"]["stage"] not in run.config.stages:
        raise UserError(f"{run.folder} is in a stage that its config.json now leaves out")
    log_file, log_bytes = run.folder / "log.jsonl", saved["log_bytes"]
    if log_bytes and not (log_file.exists() and log_file.stat().st_size >= log_bytes):
        raise UserError(f"{log_file} is incomplete: bring it back, or start a new run")
    if rank() == 0 and log_file.exists():  # forget what came after the checkpoint
        os.truncate(log_file, log_bytes)
    gather(None)  # the others read the log only now
    run.start_stage(saved["state"]["stage"])
    run.state = State(**saved["state"])
    run.batches.seek(*saved["batches"])
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    if rank():
        torch.manual_seed(hash((run.config.seed, rank(), run.state.step)))


def write_file(path: Path, save: Callable[[Path], None]) -> None:
    """save(temporary path), then rename: `path` holds the old or the new, whole, whatever comes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}. Mend it, then go on by --resume") from None


def write_checkpoint(path: Path, what: str, **content) -> None:
    content |= {"format": FORMAT, "what": what}
    write_file(path, lambda temporary: torch.save(content, temporary))


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1)
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def log(run: Run, kind: str, numbers: dict) -> None:
    """Append a line to log.jsonl. By rank 0."""
    line = {"kind": kind, "stage": run.state.stage, "step": run.state.step} | numbers
    run.latest |= numbers  # for the progress bar
    path = run.folder / "log.jsonl"
    if rank():
        return
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def make_optimizer(model: EncoderDecoder, weight_decay: float) -> torch.optim.AdamW:
    """AdamW. Matrices are decayed; gains and position biases are not."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "biases" not in name]
    others = [p for name, p in named if p.dim() != 2 or "biases" in name]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


# ----------------------------------------------------------------------------- processes
# Under torchrun N processes run this program, each on its share of the batches. They meet in
# `gather` and `add_up`, which all must call in the same order. Rank 0 validates, decodes and
# writes while the others wait.


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def meet(collective: Callable, *arguments) -> None:
    """Call a collective. A RuntimeError from it means that a process died."""
    if processes() > 1:
        try:
            collective(*arguments)
        except RuntimeError as error:
            said = one_line(str(error))[:150]
            raise UserError(f"a process of this job died: go on by --resume ({said})") from None


def gather(thing) -> list:
    """The `thing` of every process, by rank."""
    everyone = [thing] * processes()
    meet(dist.all_gather_object, everyone, thing)
    return everyone


def add_up(x: torch.Tensor) -> torch.Tensor:
    """x, summed over the processes in place."""
    meet(dist.all_reduce, x)
    return x


def gather_sums(sums: dict) -> dict[str, float]:
    """Named numbers, summed over the processes. Tensors come in one transfer from a GPU."""
    names = [name for name, value in sums.items() if torch.is_tensor(value)]
    values = torch.stack([sums[name].float() for name in names]).tolist()
    everyone = gather(sums | dict(zip(names, values)))
    return {name: sum(one[name] for one in everyone) for name in sums}


def sum_gradients(model: EncoderDecoder) -> None:
    """Every gradient, summed over the processes, in one message. DDP sends while it computes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if processes() > 1:
        vector_to_parameters(add_up(parameters_to_vector(gradients)), gradients)


def join_processes() -> None:
    """Under torchrun: meet the others, by NCCL between GPUs and by gloo else. Rank 0 prints."""
    if dist.is_torchelastic_launched():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # long: the others wait while rank 0 validates and decodes
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


# ----------------------------------------------------------------------------- the program
def parse(argv: list[str]) -> tuple[Config, bool]:
    """The config, and whether it resumes a run. Exits with code 2 on bad usage."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--init", "--resume"):  # what the other flags depend on
        first.add_argument(name, nargs="?")
    known, _ = first.parse_known_args(argv)
    resume = known.resume is not None
    settings = {}
    if known.task in TASKS:
        check_task(known.task)
        settings = dict(TASKS[known.task].settings)
    if known.init:  # T5's weights are large and need no big steps
        settings |= {"lr": 3e-4, "policy_lr": 1e-4}
    parser = Parser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with this run folder, by its own "
        f"settings; only --{', --'.join(MOVABLE)} may change",
    )
    for f in fields(Config):
        text, low, high, choices = f.metadata.values()
        text += f" [{low} to {high}]" if low is not None else ""
        how = {"type": f.type, "choices": choices}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        default = argparse.SUPPRESS if resume else settings.get(f.name, f.default)
        if f.name in MOVABLE or not resume:
            parser.add_argument(flag_name(f.name), default=default, help=text, **how)
    args = vars(parser.parse_args(argv))
    folder = args.pop("resume")
    config = Config(**args)
    if resume:
        config = replace(read_settings(Path(folder), Config), out=folder, **args)
    if args.get("init") and any(w.split("=")[0] in ("--size", "--vocab-size") for w in argv):
        parser.error("--init brings its own size and vocabulary: leave --size, --vocab-size out")
    if wrong := config.problem():
        parser.error(wrong)
    return config, resume


def check_task(name: str) -> None:
    """UserError for a row of data.TASKS that names what does not exist. Called before all else."""
    task, known = TASKS[name], {f.name: f.type for f in fields(Config)}
    if not isinstance(task, Task) or not isinstance(task.settings, dict):
        raise UserError(f"task {name}: data.TASKS needs a Task there, and its settings a dict")
    for key, value in task.settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"task {name}: its settings have {key!r}, which is no setting{hint}")
        types = (int, float) if known[key] is float else (known[key],)
        if type(value) not in types:
            raise UserError(
                f"task {name}: its settings have {key} = {value!r}, which must be of "
                f"type {known[key].__name__}"
            )
    tables = {
        "metrics": ("eval.METRICS", METRICS),
        "sample": ("data.SAMPLES", SAMPLES),
        "reader": ("data.READERS", READERS),
    }
    for column, (where, table) in tables.items():
        entry = getattr(task, column)
        if entry not in table and (entry or column == "metrics"):
            raise UserError(
                f"task {name}: its {column} {entry!r} is no key of {where}, which has "
                f"{', '.join(table)}"
            )


def new_folder(folder: Path, overwrite: bool) -> None:
    """Make the run folder. An earlier run in it is refused or, with overwrite, removed."""
    names = ["config.json", "tokenizer.json", "log.jsonl", "results.json", "last.pt"]
    for stage in STAGES:
        names += [
            f"{stage}.pt",
            *(
                f"{split}.{stage}{kind}.txt"
                for kind in ("", ".warmups")
                for split in ("train", "valid", "test")
            ),
        ]
    ours = [folder / name for name in names if (folder / name).exists()]
    if ours and not overwrite:
        whole = (folder / "config.json").exists() and (folder / "last.pt").exists()
        what = "a run: --resume it," if whole else f"a {ours[0].name}:"
        raise UserError(f"{folder} holds {what} --overwrite it, or choose another --out")
    for path in ours:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def new_model(config: Config, examples: list[Example]) -> tuple[EncoderDecoder, Tokenizer]:
    """Pretrained, or from scratch with a tokenizer of its own."""
    if config.init:
        folder = pretrained_folder(config.init)
        model = load_pretrained(folder, dropout=config.dropout)
        tokenizer = pretrained_tokenizer(folder, prompt_tags(examples), model.config.vocab_size)
    else:
        tokenizer = train_tokenizer(examples, config.vocab_size)
        model = EncoderDecoder(
            ModelConfig(
                vocab_size=tokenizer.get_vocab_size(), dropout=config.dropout, **SIZES[config.size]
            )
        )
    tokens = tokenizer.get_vocab_size() - len(special_ids(tokenizer))
    if config.estimator == "exact" and config.policy_steps and tokens**config.warmup_len > 1024:
        raise UserError(f"--estimator exact is for at most 1024 warmups, not {tokens}**W")
    return model, tokenizer


def prepare(config: Config, resume: bool) -> tuple[Run, dict[str, list[Example]]]:
    """A run that is ready to train (resume: from where it stopped), and all splits as text."""
    splits, origin = load(config)
    config = replace(config, data=origin)  # so that eval.py and --resume find the same data
    translation_metrics(config)  # a language that cannot be scored should fail now
    torch.manual_seed(config.seed)
    pick_device(config.device)  # and a device that is not here before a run is overwritten
    if resume:
        tokenizer = load_tokenizer(config.folder / "tokenizer.json")
        model = load_model(config.folder / "last.pt", tokenizer, "cpu", "state")
    else:
        model, tokenizer = new_model(config, splits["train"])
    data = {
        split: encode_split(tokenizer, splits[split], config, split, scored=split != "train")
        for split in ("train", "valid")
    }
    if not data["train"].source:
        raise UserError(
            "all training pairs are too long: raise --max-source-tokens or --max-target-tokens"
        )
    if rank() == 0:
        scored = splits.get("test", splits["valid"])
        ceiling(tokenizer, scored[:8], config)  # a metric that fails should fail now
        for lost in what_is_lost(tokenizer, scored, config):
            print(f"data: {lost}")
    if not resume and rank() == 0:
        new_folder(config.folder, config.overwrite)
        tokenizer.save(str(config.folder / "tokenizer.json"))
    run = Run(config, splits, data, tokenizer, model)
    if not resume:
        save_state(run)
        gather(None)  # the others wait for the file
    restore(run)  # all start from what rank 0 wrote: the same weights, the same data
    if rank() == 0:  # only now: what --resume changed is known to be good
        write_json(config.folder / "config.json", asdict(config))
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"model: {config.init or config.size}, {parameters / 1e6:.2f} M parameters, vocabulary "
        f"{model.config.vocab_size}, on {run.device}; {len(data['train'].source)} training pairs"
    )
    return run, splits


def report(run: Run, splits: dict[str, list[Example]]) -> None:
    """Decode the test split with each stage's best checkpoint: the table, and results.json."""
    config, split = run.config, "test" if "test" in splits else "valid"
    stages = [stage for stage in STAGES if stage in config.stages]  # in the table's order
    rows = score_run(config.folder, stages, config, run.tokenizer, splits[split], split, run.device)
    best = ceiling(run.tokenizer, splits[split], config)
    texts = ("hypotheses", "warmups")  # eval.py writes them
    packages = ("torch", "numpy", "tokenizers", "sacrebleu", "rouge-score")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    write_json(
        config.folder / "results.json",
        {
            "task": config.task,
            "pair": config.pair,
            "data": config.data,
            "split": split,
            "rows": [{k: v for k, v in vars(row).items() if k not in texts} for row in rows],
            "ceiling": best,
            "signature": signatures(config, splits[split]),
            "config": asdict(config),
            "data_checksum": run.checksum,
            "device": str(run.device),
            "processes": processes(),
            "versions": versions,
        },
    )
    print_table(rows, best, config, splits[split], split)
    show(config.folder, stages, config, run.tokenizer, splits[split][:3], run.device)
    again = f"python eval.py {shell_word(config.folder)}"
    print(f"\nsaved {config.folder / 'results.json'}. Score again: {again}")


@program
def main(argv: list[str]) -> None:
    """The program: prepare, train, report. Ctrl-C and SIGTERM finish the update and save."""
    config, resume = parse(argv)
    join_processes()
    if config.threads:
        torch.set_num_threads(config.threads)
    run, splits = prepare(config, resume)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, run.interrupt) for number in signals]
    run.train()
    for number, handler in zip(signals, before):  # all is saved: leave at once
        signal.signal(number, handler)
    if rank() == 0:
        report(run, splits)
    gather(None)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
