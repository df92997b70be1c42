"""Is my run normal? The histories of three seeds of each script, drawn as bands.

run:    python benchmarks/normal_runs.py docs/histories docs/normal_runs.png
reads:  docs/histories/SCRIPT_seed_S.csv: history.csv of these commands, S from 0 to 2
            python main_gan.py --num_epochs 20 --num_threads 1 --seed S
            python main_dcgan.py --num_epochs 10 --num_threads 1 --seed S
            python main_cgan.py --num_epochs 10 --num_threads 1 --seed S
            python main_vae.py --num_epochs 20 --num_threads 1 --seed S
writes: the picture: a row of curves for each script. A line is the mean of the three
        runs, and the band about it reaches from the lowest to the highest.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

PANELS = {  # of each script: the columns that share a panel
    "main_gan": [
        ["discriminator loss", "generator loss"],
        ["D(x)", "D(G(z))"],
        ["diversity"],
    ],
    "main_dcgan": [
        ["discriminator loss", "generator loss"],
        ["D(x)", "D(G(z))"],
        ["diversity"],
    ],
    "main_cgan": [
        ["discriminator loss", "generator loss"],
        ["D(x)", "D(G(z))"],
        ["diversity within class", "diversity within class, worst"],
    ],
    "main_vae": [
        ["loss", "test loss"],
        ["KL", "test KL"],
        ["active latents"],
    ],
}


def read_column(histories, column):
    """(runs, epochs): the column of each history."""
    return np.array([[float(row[column]) for row in rows] for rows in histories])


def draw_bands(axes, histories, columns):
    """The mean of the histories (a list of rows each), and how far they lie apart."""
    epochs = read_column(histories[:1], "epoch")[0]
    for column in columns:
        values = read_column(histories, column)
        (line,) = axes.plot(epochs, values.mean(0), label=column)
        low, high = values.min(0), values.max(0)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main(folder, path):
    figure = common.new_figure(12, 2.6 * len(PANELS))
    rows = figure.subplots(len(PANELS), 3)
    for row, (script, panels) in zip(rows, PANELS.items()):
        histories = []
        for file in sorted(Path(folder).glob(f"{script}_seed_*.csv")):
            with open(file, encoding="utf-8", newline="") as text:
                histories.append(list(csv.DictReader(text)))
        for axes, columns in zip(row, panels):
            draw_bands(axes, histories, columns)
        row[0].set_ylabel("nats")
        data = histories[0][0]["data"]
        row[1].set_title(f"{script} on {data}, {len(histories)} seeds", fontsize=10)
    common.write(path, figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
