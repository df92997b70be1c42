"""Is my run normal? The histories of several seeds of four scripts, drawn as bands.

run:    python benchmarks/normal_runs.py docs/histories docs/normal_runs.png
reads:  docs/histories/{name}_seed_{S}.csv, the history.csv of these commands:
            main_gan         python main_gan.py --num_epochs 20 --num_threads 1 --seed S
            main_gan_digits  the same, with --dataset_type digits
            main_dcgan       python main_dcgan.py --num_epochs 10 --num_threads 1 --seed S
            main_cgan        python main_cgan.py --num_epochs 10 --num_threads 1 --seed S
            main_vae         python main_vae.py --num_epochs 20 --num_threads 1 --seed S
            main_vae_digits  the same, with --dataset_type digits
writes: the picture: a row of curves for each name. A line is the mean of the runs, and
        the band about it reaches from the lowest to the highest.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

GAN = [["discriminator loss", "generator loss"], ["D(x)", "D(G(z))"], ["diversity"]]
CGAN = [*GAN[:2], ["diversity within class", "diversity within class, worst"]]
VAE = [["loss", "test loss"], ["KL", "test KL"], ["active latents"]]
PANELS = {  # the columns that share a panel
    "main_gan": GAN,
    "main_gan_digits": GAN,
    "main_dcgan": GAN,
    "main_cgan": CGAN,
    "main_vae": VAE,
    "main_vae_digits": VAE,
}


def read_histories(folder, name):
    """The histories of this name, each a list of rows {column: text}."""
    histories = []
    for path in sorted(Path(folder).glob(f"{name}_seed_*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            histories.append(list(csv.DictReader(file)))
    return histories


def draw_bands(axes, histories, columns):
    """The mean of the histories, and how far they lie apart."""
    epochs = [int(row["epoch"]) for row in histories[0]]
    for column in columns:
        values = np.array([[float(row[column]) for row in rows] for rows in histories])
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
    for row, (name, panels) in zip(rows, PANELS.items()):
        histories = read_histories(folder, name)
        for axes, columns in zip(row, panels):
            draw_bands(axes, histories, columns)
        row[0].set_ylabel("nats")
        data = histories[0][0]["data"]
        script = name.removesuffix("_digits")
        row[1].set_title(f"{script} on {data}, seeds: {len(histories)}", fontsize=10)
    common.write(path, figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
