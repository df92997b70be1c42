"""The frame of a training run: epochs, history, checkpoints, several processes, CUDA graphs.

Nothing about a model is in here: no network, no loss, no optimiser step.
"""

import atexit
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import common
from common import PROCESSES, RANK, BadInput, BrokenOff, require, warn

ALL_THREADS = torch.get_num_threads()  # torch's choice, before any run sets another
LOOK_SECONDS = 1.0  # between two looks at the losses, at each of which the host waits
AGREE_STEPS = 16  # on several GPUs: steps between two looks at what they tell each other
# what may change when a run is continued: how it is computed, not what
FREE_TO_CHANGE = {
    "num_epochs",
    "output_dir",
    "data_dir",
    "allow_fallback",
    "precision",
    "score_every",
    "score_features",
}
# what scripts write into a run's folder, and analyses beside its weights
RUN_FILES = [
    "checkpoint.pt",
    "history.csv",
    "run.html",
    "weights_*.pt",
    "*_epoch_*.png",
    "train_loss_curve*.png",
    "training.gif",
    "samples_*.png",
    "interpolations_*.png",
    "fid_vs_iterations.png",
    "latent*_space*.png",
    "latent*_space*.html",
    "latent*_space*.csv",
    "latent_space_walk.gif",
    "reconstruction_error_distribution.png",
    "anomal*.png",
    "anomal*.csv",
]


def all_reduce_mean(tensors):
    """Replace each tensor by its mean over the processes, in one message. Alone: do nothing."""
    if PROCESSES == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    means = (flat / PROCESSES).split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


def all_reduce_gradients(optimizer):
    """Between backward and step: every process then takes the same step, by the mean gradient."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    all_reduce_mean([gradient for gradient in gradients if gradient is not None])


class Run:
    """The frame of a training run. A script uses it like this:

        run = Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
        for epoch in run.epochs(train, state, num_epochs):
            for images, labels in run.batches():
                run.train_step(self.step, images)
            history = run.end_epoch({"diversity": 0.9})
            if run.pictures_due:
                run.save_weights("weights_epoch_1.pt", generator=generator)

    state is {name: network or optimiser}, which is saved and
    restored. After each epoch checkpoint.pt, history.csv and
    run.html are written. The order of the data and all noise
    depend on the seed alone, so that a continued run ends as
    one that was never stopped.
    """

    def __init__(
        self,
        script,
        model_kwargs,
        dataset_kwargs,
        trainer_kwargs,
        *,
        seed,
        device,
        num_threads,
        cuda_graph,
        resume,
        sample_every,
    ):
        require(num_threads >= 0, "num_threads must be at least 1, or 0 for torch's choice")
        require(sample_every >= 1, "sample_every must be at least 1")
        common.seed_everything(seed)
        self.script, self.model_kwargs = Path(script).stem, model_kwargs
        self.seed, self.resume = seed, resume
        self.sample_every, self.cuda_graph = sample_every, cuda_graph
        kind = common.kind_of(dataset_kwargs["dataset_type"])
        self.dataset_kwargs = {**dataset_kwargs, "dataset_type": kind}
        self.settings = {**model_kwargs, **self.dataset_kwargs, **trainer_kwargs}
        self.settings |= {"seed": seed, "processes": PROCESSES}
        check_plain(self.settings)
        self.folder = Path(trainer_kwargs["output_dir"])
        self.path = self.folder / "checkpoint.pt"
        check_output_dir(self.folder, self.dataset_kwargs)
        self.device = common.choose_device(device)
        threads = min(num_threads, os.cpu_count()) or ALL_THREADS
        torch.set_num_threads(threads)  # also for 0, since an earlier run may have changed it
        join_processes(self.device)
        self.checkpoint = self.read_checkpoint() if resume and self.path.is_file() else None
        self.history = []  # a row {column: value} for each epoch
        self.names, self.rows = [], []  # columns of the epoch's steps, and a row for each step
        self.epoch = self.stop_signal = 0
        self.first_step = 0  # where an epoch that was interrupted goes on
        self.graph = self.last_weights = None
        self.has_encoder = False

    def read_checkpoint(self):
        """The checkpoint's contents, if it was made with these settings. Raises BadInput."""
        try:
            old = common.load_weights(self.path, self.script, "settings")
        except BadInput as error:
            self.refuse(error)
        self.refuse_changes(old["settings"], self.settings)
        return old

    def refuse(self, why):
        raise BadInput(f"{why}; give another --output_dir, or start over with --resume false")

    def refuse_changes(self, old, new):
        changed = []
        for key in sorted({*old, *new} - FREE_TO_CHANGE):
            if old.get(key) != new.get(key):
                changed.append(f"{key} was {old.get(key)!r}, is {new.get(key)!r}")
        if changed:
            self.refuse(f"{self.path} was trained with other settings ({'; '.join(changed)})")

    def epochs(self, train, state, num_epochs, *, steps=None, unit="epoch", unit_size=1):
        """Yield the epochs (from 1) that are still to be trained on `train`, an Images.

        After each of them checkpoint.pt, history.csv and run.html
        are written. steps: of an epoch, if it is not a pass over
        the data. unit="iteration", unit_size=500: an epoch is
        shown and counted as 500 iterations.
        """
        self.train, self.steps = train, steps
        self.state, self.num_epochs = state, num_epochs
        self.unit, self.unit_size = unit, unit_size
        self.networks = [part for part in state.values() if isinstance(part, torch.nn.Module)]
        self.sizes = [len(index) for index in train.epoch_batches(self.seed, 1, steps)]
        self.data = {**train.record(), "steps an epoch": len(self.sizes)}
        if RANK:  # networks were built from equal seeds; noise is each process's own
            torch.manual_seed(self.seed + 1_000_003 * RANK)
        if self.checkpoint:
            self.restore(self.checkpoint)
            if self.history and num_epochs:  # a kill after checkpoint.pt leaves it a row behind
                common.write(self.folder / "history.csv", self.history)
        if self.path.is_file() and not self.checkpoint and num_epochs and not RANK:
            self.set_aside()
        if self.epoch >= num_epochs > 0:
            print(f"{self.folder}: {self.count(self.epoch)} is trained already", flush=True)
        self.bar = self.progress_bar()
        with self.signals_are_heard(), self.bar:
            for epoch in range(self.epoch + 1, num_epochs + 1):
                self.epoch = epoch
                self.pictures_due = epoch in (1, num_epochs) or epoch % self.sample_every == 0
                yield epoch
                self.save_checkpoint(epoch, step=0)
                common.write(self.folder / "history.csv", self.history)
                self.save_page()
                self.first_step = 0
                if PROCESSES == 1:
                    self.stop_if_told()
        self.say_where()

    def save_page(self):
        """run.html, to watch: the pictures of this folder, the curves, and what was set."""
        data = {
            "title": f"{self.script} on {self.train.name}: {self.folder}",
            "unit": self.unit,
            "step": self.unit_size,
            "goal": self.num_epochs * self.unit_size,
            "written": time.strftime("%H:%M on %Y-%m-%d"),
            "history": self.history,
            "pictures": sorted(path.name for path in self.folder.glob("*.png")),
            "settings": {**self.settings, **self.data, "torch": torch.__version__},
        }
        common.write(self.folder / "run.html", common.fill_page("run.html", data))

    def set_aside(self):
        """Move what an earlier run left into a folder of its own: starting over loses nothing."""
        made = time.strftime("%Y%m%d_%H%M%S", time.gmtime(self.path.stat().st_mtime))
        old = self.folder / f"run_of_{made}"
        while old.exists():
            old = old.with_name(f"{old.name}_")
        old.mkdir()
        for pattern in RUN_FILES:
            for path in list(self.folder.glob(pattern)):
                path.rename(old / path.name)
        print(f"{self.folder}: the earlier run is in {old}/ now", flush=True)

    def say_where(self):
        """At the end: where the pictures lie, and what to run next."""
        if not self.last_weights:
            return
        here = self.train.dataset_type in common.DATASET_TYPES  # can be loaded again
        weights, commands = self.last_weights, []
        if here or not self.has_encoder:  # with an encoder it needs images, too
            commands.append(f"python latent_space_interpolation.py --weights_path {weights}")
        if here and len(self.train.class_names) > 1:
            commands.append(f"python fid.py --features classifier --generated {weights}")
        print(f"pictures and weights are in {self.folder}/", *commands, sep="\n  ", flush=True)

    def batches(self):
        """Yield (images, labels) of the epoch, on the device.

        Between two of them losses are looked at, and a signal to stop is obeyed.
        """
        self.step = self.first_step
        self.rows = self.rows[: self.step]
        self.begun = last_look = time.monotonic()
        indices = self.train.epoch_batches(self.seed, self.epoch, self.steps)
        for index in indices[self.first_step :]:
            yield self.train.batch(index)
            due = time.monotonic() - last_look > LOOK_SECONDS
            if PROCESSES > 1:
                due = self.agree(due)
            self.step += 1
            self.bar.update()
            # several processes all have to stop at the same step
            if self.stop_signal and (PROCESSES == 1 or self.all_told):
                self.check_losses()
                self.save_checkpoint(self.epoch - 1, self.step)
                self.stop_if_told()
            if due:
                self.show(self.check_losses())
                last_look = time.monotonic()

    def agree(self, due):
        """Give all processes the same losses and batch norm statistics, and the word to stop.

        due: whether to look at the losses. Returns what the first
        process says, so that all leave at the same step.
        """
        due = due and not RANK
        told = torch.tensor([float(self.stop_signal > 0), float(due)], device=self.device)
        buffers = [b for network in self.networks for b in network.buffers()]
        buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        all_reduce_mean([*buffers, self.rows[-1], told])
        listen = self.device.type == "cpu" or self.step % AGREE_STEPS == 0
        stop, due = (told > 0).tolist() if listen else (False, False)
        self.all_told = stop
        if stop:
            self.stop_signal = self.stop_signal or signal.SIGTERM
        return due

    def train_step(self, step, *inputs):
        """Call step(*inputs), on an NVIDIA GPU as a CUDA graph, and keep the scalars it returns.

        They are {column in words: tensor}, the same columns at
        each step of an epoch, and stay on the device: nothing
        waits for them. inputs are tensors, and `step` is always
        the same function, since it is recorded. If it returns
        other columns since an interruption in the epoch, this
        epoch's means are over the steps since then.
        """
        recordable = self.cuda_graph and self.device.type == "cuda" and PROCESSES == 1
        if recordable and self.graph is None:
            self.graph = Graph(step, self)
        if self.graph and step != self.graph.step:
            raise TypeError("train_step has recorded another `step`; give --cuda_graph false")
        values = self.graph(*inputs) if self.graph else step(*inputs)
        if self.names != list(values):
            if self.step > self.first_step:
                raise TypeError("`step` must return the same columns at each step of an epoch")
            self.names, self.rows = list(values), []
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.ndim:
                raise TypeError(f"{name!r}: `step` must return tensors of shape (), not {value!r}")
        self.rows.append(torch.stack(tuple(values.values())).detach().float())

    def end_epoch(self, measured):
        """Add a row to the history: means of the steps' scalars, and `measured` {column: number}.

        Returns the history, a list of such rows.
        """
        twice = ", ".join(name for name in measured if name in self.names)
        require(not twice, f"{twice}: `step` and end_epoch may not have a column of the same name")
        rows = self.check_losses()  # fewer than steps if columns are new since an interruption
        done = self.sizes[: self.step]  # images of each step
        sizes = torch.tensor(done[-len(rows) :], dtype=torch.float64)
        means = (sizes[:, None] * rows).sum(0) / sizes.sum()
        row = {self.unit: self.epoch * self.unit_size, "data": self.train.name}
        row |= dict(zip(self.names, means.tolist()))
        for name, value in measured.items():
            row[name] = value.item() if hasattr(value, "item") else value  # of torch or numpy
        self.history.append(row)
        if self.bar.disable:
            self.print_line(row)
        return self.history

    def progress_bar(self):
        """Counts steps, on a terminal only; elsewhere each epoch prints a line."""
        from tqdm import tqdm

        steps = len(self.sizes)
        quiet = RANK > 0 or not sys.stderr.isatty()
        done = self.epoch * steps + self.first_step
        return tqdm(total=self.num_epochs * steps, initial=done, unit=" steps", disable=quiet)

    def show(self, rows):
        """The latest scalars in the bar. rows: those of the epoch's steps so far."""
        latest = {name: f"{value:.4g}" for name, value in zip(self.names, rows[-1].tolist())}
        self.bar.set_description(self.count(self.epoch), refresh=False)
        self.bar.set_postfix(latest, refresh=False)

    def print_line(self, row):
        """A line for an epoch: its row of the history, and the time that is left."""
        seconds = (time.monotonic() - self.begun) / max(1, self.step - self.first_step)
        left = (self.num_epochs - self.epoch) * len(self.sizes) * seconds / 60
        numbers = []
        for name, value in list(row.items())[2:]:  # without unit and data
            numbers.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        place = f"{self.count(self.epoch)}/{self.num_epochs * self.unit_size}"
        print(place, *numbers, f"{left:.1f} min left", sep="  ", flush=True)

    def save_weights(self, name, **networks):
        """Write what sampling and analysis need: the networks, and the settings to rebuild them."""
        self.last_weights, self.has_encoder = self.folder / name, "encoder" in networks
        contents = {
            "script": self.script,
            "model_kwargs": self.model_kwargs,
            "dataset_kwargs": self.dataset_kwargs,
            "data": self.train.record(),
            "epoch": self.epoch,
        }
        contents |= {part: network.state_dict() for part, network in networks.items()}
        common.save_tensors(self.last_weights, contents)

    def count(self, epoch):
        return f"{self.unit} {epoch * self.unit_size}"

    def check_losses(self):
        """The epoch's scalars so far, on the host. Breaks off if they or weights are not finite."""
        rows = torch.stack(self.rows[: self.step]).cpu()
        wrong = (~rows.isfinite()).nonzero().tolist()
        if wrong:
            row, column = wrong[0]
            step = self.step - len(rows) + row + 1
            place = f"{self.count(self.epoch)}, step {step}"
            self.break_off(f"{self.names[column]} became {rows[row, column]} at {place}")
        finite = [p.isfinite().all() for network in self.networks for p in network.parameters()]
        if not all(finite):  # no loss has told yet
            place = f"{self.count(self.epoch)}, step {self.step}"
            self.break_off(f"weights are no longer finite after {place}")
        return rows

    def break_off(self, what):
        raise BrokenOff(
            f"{what}; {self.last_good()}; train anew with a lower learning rate and another "
            "--output_dir"
        )

    def last_good(self):
        if self.epoch == 1:
            return f"no {self.unit} was finished"
        return f"{self.path} still holds {self.count(self.epoch - 1)}"

    def save_checkpoint(self, epoch, step):
        """Write everything that continuing needs."""
        random_states = [random_state(self.device)]
        if PROCESSES > 1:
            random_states = [None] * PROCESSES
            distributed.all_gather_object(random_states, random_state(self.device))
        contents = {
            "script": self.script,
            "settings": self.settings,
            "dataset_kwargs": self.dataset_kwargs,
            "data": self.data,
            "epoch": epoch,
            "step": step,
            "names": self.names,
            "rows": [row.tolist() for row in self.rows[:step]],
            "history": self.history,
            "random_states": random_states,
            "state": {name: part.state_dict() for name, part in self.state.items()},
        }
        common.save_tensors(self.path, contents)

    def restore(self, old):
        """Go on where the checkpoint was written. Raises BadInput if the script was changed."""
        self.refuse_changes(old["data"], self.data)
        for name, part in self.state.items():
            rates = [group["lr"] for group in getattr(part, "param_groups", [])]
            try:
                part.load_state_dict(old["state"][name])
            except (KeyError, RuntimeError, ValueError):
                self.refuse(f"{self.path} is of another {name} than the script has now")
            # Loading has replaced the groups. The script holds the old
            # tensor of a rate, so it is put back, with the loaded value.
            groups = getattr(part, "param_groups", [])
            for group, rate in zip(groups, rates):
                if isinstance(rate, torch.Tensor):
                    group["lr"] = rate.fill_(group["lr"])
        self.epoch, self.first_step, self.history = old["epoch"], old["step"], old["history"]
        self.names = old["names"]
        self.rows = [torch.as_tensor(row, device=self.device) for row in old["rows"]]
        set_random_state(self.device, old["random_states"][RANK])

    @contextmanager
    def signals_are_heard(self):
        """Inside, Ctrl-C and SIGTERM let the step under way finish."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        if self.stop_signal and PROCESSES == 1:  # torchrun sends each signal twice
            raise KeyboardInterrupt(f"stopped at once; {self.last_good()}")
        self.stop_signal = number  # the step under way is finished first

    def stop_if_told(self):
        again = "run the same command again" + ("" if self.resume else " without --resume false")
        message = f"stopped and saved; {again} to continue"
        if self.stop_signal == signal.SIGTERM:
            warn(f"{self.script}.py: {message}")
            sys.exit(143)
        if self.stop_signal:
            raise KeyboardInterrupt(message)


def join_processes(device):
    """Under `torchrun --nproc_per_node=N SCRIPT.py`: make the N processes one group."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs and messages use the current GPU
    if PROCESSES > 1 and not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # the others wait while the first one downloads the data
        distributed.init_process_group(backend, timeout=timedelta(hours=2))
        # a process that ends while gloo's threads run sometimes crashes
        atexit.register(distributed.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all


def check_plain(settings):
    """Raises BadInput for a numpy number or a Path, which weights_only could not load again."""
    for key, value in settings.items():
        plain = type(value) in (bool, int, float, str, tuple, list, type(None))
        require(plain, f"{key} must be a plain number, bool or str, not {value!r}")


def check_output_dir(folder, dataset_kwargs):
    """Raises BadInput if nothing can be written there; the first file makes the folder.

    It may not lie among the user's own images, where a run's pictures would become data.
    """
    if dataset_kwargs["dataset_type"] == "folder":
        data_dir = Path(dataset_kwargs["data_dir"]).resolve()
        outside = not folder.resolve().is_relative_to(data_dir)
        require(outside, f"output_dir {folder} must lie outside data_dir, whose images are read")
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise BadInput(f"output_dir {folder} cannot be written: {error.strerror}")


def random_state(device):
    """The states of torch's random generators, on the host and on the device."""
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "mps"):  # they have random numbers of their own
        states.append(getattr(torch, device.type).get_rng_state())
    return states


def set_random_state(device, states):
    """Go on with random numbers where `random_state` was called."""
    torch.set_rng_state(states[0])
    if device.type in ("cuda", "mps") and len(states) > 1:
        generator = getattr(torch, device.type)
        if len(states[1]) == len(generator.get_rng_state()):  # else of the other kind of GPU
            generator.set_rng_state(states[1])


class Graph:
    """A training step as one CUDA graph: its small kernels are recorded once, then replayed.

    https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    The first three steps run without a graph, on a stream of
    their own, and are steps of training like the others: they are
    the warm-up that recording asks for. Smaller batches always
    run without the graph. The tensors that come back are
    overwritten by the next step.
    """

    def __init__(self, step, run):
        self.step, self.run = step, run
        self.warm_up_steps = 3  # that are left
        self.graph = self.inputs = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.warm_up_steps:
            return self.warm_up(inputs)
        if self.graph is None and len(inputs[0]) == max(self.run.sizes):
            self.record(inputs)
        if self.graph is None or inputs[0].shape != self.inputs[0].shape:
            return self.step(*inputs)
        for static, now in zip(self.inputs, inputs):
            static.copy_(now)
        self.graph.replay()
        return self.values

    def warm_up(self, inputs):
        self.warm_up_steps -= 1
        for part in self.run.state.values():
            for group in getattr(part, "param_groups", ()):
                group["capturable"] = True  # the optimiser counts its steps on the device
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            values = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return values

    def record(self, inputs):
        self.inputs = [x.clone() for x in inputs]
        for network in self.run.networks:
            network.zero_grad(set_to_none=True)  # gradients are made anew, in the graph's memory
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # nothing is computed here, only recorded
                values = self.step(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # CUDA may be of no use to this process any more
            raise BrokenOff(
                "this step cannot be recorded as a CUDA graph; start again with "
                f"--cuda_graph false ({error})"
            )
        # the values alone, without what autograd recorded of them
        self.values = {name: value.detach() for name, value in values.items()}
        self.graph = graph
