"""Runs train.py and eval.py on a pretended accelerator: a lost device shows on every computer.

    python tests/pretend_device.py '[["train", "--task", "wmt"], ["eval", "runs/wmt"]]'

Its tensors hold real numbers, computed on the CPU, and say that they are elsewhere. As on a GPU, an
operation that mixes devices raises. With --device cpu a command runs as ever. The output is JSON:
of each command what it printed, its exit code, where the host waited for the device how often, and
whether the generators of random numbers are as they were before.

It rests on torch's Python backends (torch.utils.backend_registration), which are experimental. To
register one changes torch in the whole process and for good. So this is a program, not a fixture.
Left out: autocast (such a device has none), CUDA's kernels, its memory, its speed.
"""

import collections
import contextlib
import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UNSUPPORTED = 77  # our exit code if this torch has no such backends
WAITS = collections.Counter()  # "function/function/…: why" -> how often
STEPS = []  # of decoding, where the program asked whether it may stop

# of a GPU's tensor, these need a number or a size on the host
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Backend:
    """What torch asks of a device module. As CUDA it has a generator of its own."""

    state = torch.get_rng_state()
    _initialized = True
    is_available = is_initialized = lambda self: True
    device = lambda self, number: contextlib.nullcontext()
    current_device = lambda self: 0
    device_count = lambda self: 1
    _is_in_bad_fork = lambda self: False
    _lazy_init = lambda self: None
    get_rng_state = lambda self, device=None: self.state.clone()
    get_amp_supported_dtype = lambda self: [torch.bfloat16]

    def manual_seed_all(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def set_rng_state(self, state, device=None):
        self.state = state

    def draw(self, function):
        """What function() returns if it draws from this generator."""
        cpu_state = torch.get_rng_state()
        torch.set_rng_state(self.state)
        drawn = function()
        self.state = torch.get_rng_state()
        torch.set_rng_state(cpu_state)
        return drawn


BACKEND = Backend()


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device. `here` holds its numbers, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)  # the program's own branches for CUDA are taken

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):  # of torch's C++ code: not seen by a dispatch
        waited("tolist")
        return self.here.tolist()

    def __format__(self, how):  # torch's own is for its very type alone
        return format(self.item(), how)

    def numpy(self, *args, **kwargs):
        raise TypeError("a GPU's tensor has no numpy array: call .cpu() first")


class Pretend(TorchDispatchMode):
    """Sees what makes a tensor on the device from nothing, too, such as torch.arange."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def waited(why):
    """Count it, under the names of the program's functions that are running."""
    names, frame = [], sys._getframe(1)
    while frame:
        if os.path.dirname(frame.f_code.co_filename) == ROOT and frame.f_code.co_name[0] != "<":
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    WAITS[f"{'/'.join(reversed(names))}: {why}"] += 1


def elsewhere(real):
    """A CPU tensor as one of the device."""
    tensor = torch.Tensor._make_wrapper_subclass(
        Elsewhere,
        real.shape,
        strides=real.stride(),
        storage_offset=real.storage_offset(),
        dtype=real.dtype,
        device=torch.device("pretend:0"),
    )
    tensor.here = real
    return tensor


def bring(x, met):
    """An argument with CPU tensors alone. What it held is noted in met: id -> tensor."""
    if isinstance(x, (list, tuple)):
        return [bring(item, met) for item in x]
    if not isinstance(x, torch.Tensor):
        return x
    real = x.here if isinstance(x, Elsewhere) else x
    met[id(real)] = x
    return real


def compute(function, args, kwargs):
    """Call a function of torch, on the CPU. What it returns is where a GPU would put it."""
    name, met = function.overloadpacket.__name__, {}
    real_args = bring(args, met)
    real_kwargs = {key: bring(value, met) for key, value in kwargs.items()}
    was_there = goes_there = any(isinstance(x, Elsewhere) for x in met.values())
    if kwargs.get("device") is not None:
        goes_there = kwargs["device"].type == "pretend"
        if goes_there:
            real_kwargs["device"] = torch.device("cpu")
    if name == "copy_":
        goes_there, was_there = (isinstance(x, Elsewhere) for x in args[:2])
    if name not in ("copy_", "_to_copy"):
        if was_there:
            watch(name, args, met.values())
    elif was_there and not goes_there:
        waited("to the CPU")
    elif goes_there and not was_there:
        if not (kwargs.get("non_blocking") or True in args[2:]):
            waited("to the device")
    call = partial(function, *real_args, **real_kwargs)
    drawn_there = goes_there and torch.Tag.nondeterministic_seeded in function.tags
    return place(BACKEND.draw(call) if drawn_there else call(), goes_there, met)


def place(x, there, met):
    """What a function returned, where it belongs. In place: the tensor of met that it changed."""
    if isinstance(x, (list, tuple)):
        return type(x)(place(item, there, met) for item in x)
    if not isinstance(x, torch.Tensor):
        return x
    if id(x) in met:
        return met[id(x)]
    return elsewhere(x) if there else x


def watch(name, args, tensors):
    """Of an operation on the device: count what the host waits for, raise where a GPU would."""
    if name in READS:
        waited(name)
    if name in INDEXING:  # an index may come from the CPU
        indices = [x for x in args[1] if x is not None]
        tensors = [args[0], *args[2:3]]
        for x in indices:
            if x.dtype == torch.bool:
                waited("a mask as index")
            elif not isinstance(x, Elsewhere):
                waited("to the device")
    for x in tensors:
        alone = x.dim() or name in ("cat", "stack") or (x is args[0] and name.endswith("_"))
        if alone and not isinstance(x, Elsewhere):
            raise RuntimeError(f"{name}: a tensor of shape {tuple(x.shape)} is on the CPU")


def register():
    """Make the device known to torch, or exit: an experimental interface may fail in any way."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("pretend", backend_module=BACKEND)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(UNSUPPORTED)


def patch_torch():
    """Replace what of torch does not ask the device."""
    tensor, save, load = torch.tensor, torch.save, torch.load

    def new_tensor(data, *args, device=None, **kwargs):  # the constructor in C++ asks nobody
        made = tensor(data, *args, **kwargs)
        return made if device is None else made.to(device)

    def real(x):
        return x.detach().here.clone() if isinstance(x, Elsewhere) else x

    def load_to(*args, map_location=None, **kwargs):
        if map_location is None:
            raise RuntimeError("a checkpoint of a GPU cannot be read where there is none")
        return load(*args, map_location=map_location, **kwargs)

    torch.tensor, torch.load = new_tensor, load_to
    torch.save = lambda content, *args, **kwargs: save(tree_map(real, content), *args, **kwargs)


def generators_are(cpu, device):
    """Whether the states of both are these."""
    return torch.equal(cpu, torch.get_rng_state()) and torch.equal(device, BACKEND.state)


def run(main, argv):
    """Run a command of the program. What it did, as JSON takes it."""
    WAITS.clear()
    STEPS.clear()
    generators = [torch.get_rng_state(), BACKEND.get_rng_state()]
    printed, said = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    mode = contextlib.nullcontext() if "cpu" in argv else Pretend()
    with redirect_stdout(printed), redirect_stderr(said), sdpa_kernel(SDPBackend.MATH), mode:
        try:
            code = main(argv)
        except (Exception, SystemExit):
            traceback.print_exc()
            code = "raised"
    printed.seek(0)
    said.seek(0)
    return {
        "code": code,
        "printed": printed.read(),
        "said": said.read()[-2000:],
        "waits": dict(WAITS),
        "steps": list(STEPS),
        "generators": generators_are(*generators),
    }


if __name__ == "__main__":
    register()
    patch_torch()
    sys.path.insert(0, ROOT)
    import eval as evaluation
    import model
    import train

    for module in (model, train, evaluation):
        module.pick_device = lambda name, threads: torch.device(
            "cpu" if name == "cpu" else "pretend:0"
        )
    may_stop = model.all_true
    model.all_true = lambda done, step: STEPS.append(step) or may_stop(done, step)
    programs = {"train": train.main, "eval": evaluation.main}
    print(json.dumps([run(programs[name], argv) for name, *argv in json.loads(sys.argv[1])]))
