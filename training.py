"""The frame of a training run: epochs, history, checkpoints, signals; several processes; CUDA graphs.

Nothing about a model is in here: no network, no loss, no optimiser step. A script can be understood without it.
"""
import contextlib
import csv
import ctypes
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from common import PROCESSES, RANK, BadInput, check, choose_device, load, save, say, seed_everything, write

REFRESH_SECONDS = 1.0  # between two looks at the losses; each look makes the host wait for the device once
AGREE_STEPS = 16  # of several processes: between two looks at whether one was told to stop
FREE_TO_CHANGE = {"num_epochs", "output_dir", "data_dir", "device", "num_threads", "precision", "cuda_graph",
                  "sample_every", "resume", "allow_fallback"}  # when continuing
LOWER = "train anew with a lower learning rate and another --output_dir"


# --------------------------------------------------------------------------------------------------- processes


def join_processes(device):
    """Under `torchrun --nproc_per_node=N SCRIPT.py`: make the N processes one group. Alone: nothing to do."""
    if PROCESSES > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all


@contextlib.contextmanager
def first_process_first():
    """The others wait until the first process has left this block: what it downloads or caches, they find."""
    if PROCESSES > 1 and RANK:
        distributed.barrier()
    yield
    if PROCESSES > 1 and not RANK:
        distributed.barrier()


def average(tensors):
    """Replace each tensor by its mean over the processes, all in one message. Alone: nothing to do."""
    if PROCESSES > 1 and tensors:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= PROCESSES
        with torch.no_grad():
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(mean.view_as(tensor))


def average_gradients(optimizer):
    """Between backward and step: every process takes the same step, that of the mean over all their batches."""
    average([p.grad for group in optimizer.param_groups for p in group["params"]])


# --------------------------------------------------------------------------------------------------------- run


def keep_freed_memory():
    """On Linux: let the memory of large tensors be used again rather than handed back to the system at every step.

    glibc maps blocks above 32 MiB anew each time, and the system zeroes them: main_ae took 592 ms a step, 485 so.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap's end given back


class Run:
    """The frame of a training: checks settings, sets seed, device and threads, keeps history and checkpoints.

        for epoch in run.epochs(train, state):          # state: {name: module or optimiser}, saved and restored
            for images, labels in run.batches():
                run.log(step(images))                   # a dict of scalars on the device
            run.end_epoch(diversity=...)                # a row of the history
            if run.sampling: ...                        # this epoch's pictures and weights

    After each epoch history.csv and, last of all, checkpoint.pt are written: what it says is done is on the disk.
    Order of the data and noise depend on the seed alone, so a continued run ends as an uninterrupted one does.
    """
    unit, each = "epoch", 1  # gan_cub.py counts iterations: an epoch is `each` of them, and names and messages say so

    def __init__(self, script, model_kwargs, dataset_kwargs, *, num_epochs, output_dir, sample_every, seed, device,
                 num_threads, resume, cuda_graph, **trainer_kwargs):
        self.settings = {**model_kwargs, **dataset_kwargs, **trainer_kwargs, "num_epochs": num_epochs,
                         "output_dir": output_dir, "sample_every": sample_every, "seed": seed, "device": device,
                         "num_threads": num_threads, "resume": resume, "cuda_graph": cuda_graph}
        check(script, self.settings)
        if PROCESSES > 1:
            self.settings["processes"] = PROCESSES
        self.script, self.model_kwargs, self.trainer_kwargs = Path(script).stem, dict(model_kwargs), trainer_kwargs
        self.num_epochs, self.sample_every, self.seed, self.folder = num_epochs, sample_every, seed, Path(output_dir)
        self.cuda_graph = cuda_graph
        self.again = "run the same command again" + ("" if resume else " without --resume false")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise BadInput(f"output_dir {output_dir} cannot be written: {error.strerror}")
        self.device = choose_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # graphs and messages between processes go by the current GPU
        join_processes(self.device)
        if num_threads:
            torch.set_num_threads(min(num_threads, os.cpu_count()))
        self.epoch = self.start = self.stopped_by = 0
        self.history, self.checkpoint, self.path = {}, None, self.folder / "checkpoint.pt"
        if self.path.is_file() and resume:
            try:
                self.checkpoint = load(self.path, self.script, "settings")
            except BadInput as error:
                raise BadInput(f"{error}; give another --output_dir, or start over with --resume false")
            self._compare(self.checkpoint["settings"], self.settings)
        seed_everything(seed)

    def _compare(self, old, new):
        changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in sorted({*old, *new} - FREE_TO_CHANGE)
                   if old.get(key) != new.get(key)]
        if changed:
            raise BadInput(f"{self.folder}/checkpoint.pt was trained with other settings ({'; '.join(changed)}); "
                           "give another --output_dir, or start over with --resume false")

    def epochs(self, train, state):
        """Yield the epochs (from 1) that are still to be trained on `train`, an Images."""
        self.train, self.state, self.names, self.rows = train, state, [], None
        self.data = {"data": train.name, "images": len(getattr(train, "images", train))}  # a Stream's are in its images
        self.sizes = [len(index) for index in train.order(self.seed, 1)]  # images a step, of this process
        self.buffers = [b for network in self._networks() for b in network.buffers() if b.is_floating_point()]
        if self.checkpoint:
            self._restore(self.checkpoint)
        elif RANK:  # every process began with the same weights; from here on each draws noise of its own
            torch.manual_seed(self.seed + 1_000_003 * RANK)
        if self.epoch >= self.num_epochs > 0:
            print(f"{self.folder}: {self.epoch * self.each} {self.unit}s are trained already"
                  + ("; more with --num_epochs" if self.unit == "epoch" else ""), flush=True)
        weights = sum(t.numel() * t.element_size() for network in self._networks() for t in network.parameters())
        need, free = 8 * weights, shutil.disk_usage(self.folder).free  # weights, two moments and the rest, old and new
        if need > free:
            raise BadInput(f"{self.folder} has {free / 2**20:.0f} MiB free; checkpoints need {need / 2**20:.0f} MiB")
        if self.path.is_file() and not self.checkpoint and self.num_epochs and not RANK:  # starting over loses nothing
            os.replace(self.path, next(path for number in itertools.count(1) if not (
                path := self.folder / f"checkpoint_before_{number}.pt").exists()))
        self.bar = None
        if sys.stderr.isatty() and not RANK:
            from tqdm import tqdm

            self.bar = tqdm(total=self.num_epochs * len(train), initial=self.epoch * len(train), unit=" images",
                            unit_scale=True, dynamic_ncols=True)
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for self.epoch in range(self.epoch + 1, self.num_epochs + 1):
                due = self.epoch in (1, self.num_epochs) or self.epoch % self.sample_every == 0
                self.sampling = due and not RANK
                yield self.epoch
                self._write_history()
                self._save(self.epoch, step=0)
                self.start = 0
                if PROCESSES == 1:
                    self._give_way()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.bar:
                self.bar.close()

    def batches(self):
        """Yield (images, labels) of the epoch. Losses are looked at about once a second, for the bar and for NaN."""
        self.step, self.begun = self.start, time.monotonic()
        looked = self.begun
        for index in self.train.order(self.seed, self.epoch)[self.start:]:
            yield self.train.batch(index)
            if PROCESSES > 1:
                self._stay_alike()
            self.step += 1
            if self.all_stop if PROCESSES > 1 else self.stopped_by:
                self._look()
                self._save(self.epoch - 1, self.step)
                self._give_way()
            if time.monotonic() - looked > REFRESH_SECONDS:
                self._look()
                looked = time.monotonic()

    def _stay_alike(self):
        """After a step: give all processes the same losses and batch norm statistics; learn if one was told to stop.

        Within the step each process normalises with its own batch.
        """
        told = torch.tensor([float(self.stopped_by > 0)], device=self.device)
        average([*self.buffers, self.rows[self.step], told])
        # a look makes the host wait for the device; and all processes have to stop at the same step
        self.all_stop = self.step % AGREE_STEPS == 0 and told.item() > 0
        self.stopped_by = self.stopped_by or self.all_stop * signal.SIGTERM

    def fast_step(self, step):
        """`step`, or on an NVIDIA GPU (with cuda_graph) the same step replayed as one CUDA graph."""
        if self.device.type != "cuda" or not self.cuda_graph:
            return step
        if PROCESSES > 1:
            say("several processes: steps are not recorded as a CUDA graph")
            return step
        return _Graph(step, self)

    def log(self, values):
        """Keep one step's scalars, {name in words: tensor}, on the device: nothing waits for them."""
        if self.rows is None:
            self.names, self.rows = list(values), torch.zeros(len(self.sizes), len(values), device=self.device)
        with torch.no_grad():
            torch.stack(tuple(values.values()), out=self.rows[self.step])

    def end_epoch(self, **extra):
        """Add a row to the history: the epoch's means of what was logged, and `extra` numbers (_ reads as a blank)."""
        rows = self._look()
        if not all(p.isfinite().all() for network in self._networks() for p in network.parameters()):
            raise FloatingPointError(f"weights are no longer finite after {self._count(self.epoch)}; "
                                     f"{self._last_good()}; {LOWER}")
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        means = (sizes @ rows.double() / sizes.sum()).tolist()
        row = {self.unit: self.epoch * self.each, "data": self.train.name, **dict(zip(self.names, means)),
               **{name.replace("_", " "): value for name, value in extra.items()}}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if not self.bar:
            each = max(time.monotonic() - self.begun, 1e-3) / max(1, self.step - self.start)  # seconds a step
            left = round((self.num_epochs - self.epoch) * len(self.sizes) * each)
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
            print(f"{self._count(self.epoch)}/{self.num_epochs * self.each}  {numbers}  "
                  f"{PROCESSES * self.sizes[0] / each:,.0f} images/s  {left // 60}:{left % 60:02d} min left",
                  flush=True)

    def save_weights(self, **networks):
        """Write weights_epoch_{E}.pt: what sampling and analysis need."""
        save(self.folder / f"weights_{self._count(self.epoch).replace(' ', '_')}.pt",
             {"script": self.script, "model_kwargs": self.model_kwargs, "data": self.train.name, "epoch": self.epoch,
              **{name: network.state_dict() for name, network in networks.items()}})

    def _networks(self):
        return [part for part in self.state.values() if isinstance(part, torch.nn.Module)]

    def _last_good(self):
        return (f"{self.folder}/checkpoint.pt still holds {self._count(self.epoch - 1)}" if self.epoch > 1
                else f"no {self.unit} was finished" if self.each == 1 else "none is written yet")

    def _count(self, epoch):
        return f"{self.unit} {epoch * self.each}"

    def _look(self):
        """Read the epoch's losses so far; stop at the first that is not finite."""
        rows = self.rows[:self.step].cpu()
        for step, column in (~rows.isfinite()).nonzero().tolist()[:1]:
            raise FloatingPointError(f"{self.names[column]} became {rows[step, column].item()} at "
                                     f"{self._count(self.epoch)}, step {step + 1}; {self._last_good()}; {LOWER}")
        if self.bar:
            self.bar.set_description(f"{self._count(self.epoch)}/{self.num_epochs * self.each}", refresh=False)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in zip(self.names, rows[-1].tolist())}, False)
            done = PROCESSES * sum(self.sizes[:self.step])
            self.bar.update((self.epoch - 1) * len(self.train) + done - self.bar.n)
        return rows

    def _write_history(self):
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(self.history)
        table.writerows(zip(*self.history.values()))
        write(self.folder / "history.csv", text.getvalue().encode())

    def _save(self, epoch, step):
        name, numbers, *rest = np.random.get_state()
        rng = {"torch": torch.get_rng_state(), "numpy": [name, numbers.tolist(), *rest], "python": random.getstate()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            rng["mps"] = torch.mps.get_rng_state()
        rngs = [rng]
        if PROCESSES > 1:
            rngs = [None] * PROCESSES
            distributed.all_gather_object(rngs, rng)
        save(self.path,
             {"script": self.script, "model_kwargs": self.model_kwargs, "settings": self.settings,
              **self.data, "epoch": epoch, "step": step, "names": self.names, "rows": self.rows[:step].clone(),
              "history": self.history, "rng": rngs,
              "state": {name: part.state_dict() for name, part in self.state.items()}})

    def _restore(self, old):
        self._compare({name: old.get(name, value) for name, value in self.data.items()}, self.data)
        for name, part in self.state.items():
            part.load_state_dict(old["state"][name])
        self.epoch, self.start, self.history, self.names = old["epoch"], old["step"], old["history"], old["names"]
        self.rows = torch.zeros(len(self.sizes), len(self.names), device=self.device)
        self.rows[:self.start] = old["rows"]
        rng = old["rng"][RANK]
        torch.set_rng_state(rng["torch"])
        np.random.set_state(tuple(rng["numpy"]))
        random.setstate(rng["python"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in rng:
            torch.mps.set_rng_state(rng["mps"])

    def _stop(self, number, frame):
        if self.stopped_by and PROCESSES == 1:  # torchrun signals twice by itself
            raise KeyboardInterrupt(f"stopped at once; {self._last_good()}")
        self.stopped_by = number  # the step under way is finished first

    def _give_way(self):
        if self.stopped_by == signal.SIGTERM:
            sys.exit(say(f"{self.script}.py: stopped and saved; {self.again} to continue", 143))
        if self.stopped_by:
            raise KeyboardInterrupt(f"stopped and saved; {self.again} to continue")


class _Graph:
    """A training step as one CUDA graph: its hundreds of small kernels are recorded once, then launched in one go.

    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. The first three steps run as they are, on a stream of
    their own, and count: they are the warm-up that recording asks for. Smaller batches (an epoch's last) run as they
    are too. Noise advances as without the graph. The tensors that come back are overwritten by the next step.
    """

    def __init__(self, step, run):
        self.step, self.run, self.warm_up, self.graph, self.inputs = step, run, 3, None, None

    def __call__(self, *inputs):
        if self.warm_up:
            self.warm_up -= 1
            for part in self.run.state.values():
                for group in getattr(part, "param_groups", ()):
                    group["capturable"] = True  # the optimiser then counts its steps on the device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                values = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return values
        if self.inputs is None and len(inputs[0]) == max(self.run.sizes):
            self._record(inputs)
        if self.graph is None or [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            return self.step(*inputs)
        for static, now in zip(self.inputs, inputs):
            static.copy_(now)
        self.graph.replay()
        return self.values

    def _record(self, inputs):
        self.inputs = [x.clone() for x in inputs]
        for network in self.run._networks():
            network.zero_grad(set_to_none=True)  # gradients are then made anew, in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # nothing is computed here, only written down
                self.values = self.step(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            say("this step cannot be recorded as a CUDA graph and runs as it is (if it fails, try --cuda_graph false): "
                f"{error}")
