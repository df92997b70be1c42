"""Runs killed with SIGKILL at random moments end with the bytes of a run that was left alone."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "main_gan.py"
KILLS = int(os.environ.get("KILLS", "3"))


def start(folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, SCRIPT, "--dataset_type", "digits", "--num_epochs", "12", "--sample_every",
                             "4", "--batch_size", "30", "--generator_hidden_size", "32", "--discriminator_hidden_size",
                             "32", "--output_dir", "out", "--device", "cpu"],
                            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_runs_end_as_one_never_killed(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    killed = 0
    while killed < KILLS:
        run = start(tmp_path / "parts")
        checkpoint = tmp_path / "parts" / "out" / "checkpoint.pt"
        written = checkpoint.stat().st_mtime_ns if killed else 0
        while run.poll() is None and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0) == written:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.25))  # somewhere in the two or three epochs after its first checkpoint
        assert run.poll() is None, "it ended before it could be killed; give it more epochs"
        run.kill()
        run.wait()
        killed += 1
    last = start(tmp_path / "parts")
    assert last.wait() == 0, last.stderr.read()
    for name in ("checkpoint.pt", "weights_epoch_12.pt", "weights_epoch_4.pt", "history.csv",
                 "generated_image_epoch_12.png", "train_loss_curve_12.png"):
        whole, parts = ((tmp_path / run / "out" / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, name
    assert not list((tmp_path / "parts" / "out").glob("*.part"))
