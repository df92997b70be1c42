"""A fully connected GAN on MNIST:
the smallest adversarial pair that draws digits.

paper:  Goodfellow et al. 2014, Generative Adversarial
        Nets, https://arxiv.org/abs/1406.2661
run:    python main_gan.py --num_epochs 20          (all keys of the dicts are options)
        python main_gan.py --resume false           (start over)
        torchrun --nproc_per_node=2 main_gan.py     (two processes, a batch each)
writes: mnist_GAN/. After every epoch: history.csv, run.html
        (open it to watch: the folder's pictures, and curves),
        checkpoint.pt (also at Ctrl-C; the same command continues
        from it).
        After the first, the last and each sample_every-th:
        generated_image_epoch_{E}.png, train_loss_curve_{E}.png,
        weights_epoch_{E}.pt (for sampling)
differs from the paper: LeakyReLU and no dropout in D (there:
        maxout, dropout) and Adam (there: momentum), as in most GANs
        since; smoothed labels, see trainer_kwargs, and He
        weights in G, see Generator; the steps of D and of G share
        their generated images (there: new ones), which saves a pass
expect: MNIST, 20 epochs, seed 0: readable digits; D(x) 0.62,
        D(G(z)) 0.38, diversity 0.97 (see `fit`), D's loss 1.18,
        G's 1.22; 3.4 min on one core of an AMD EPYC. D(x) and
        D(G(z)) are the probabilities of being real that D gives
        to real and to generated images. Both are 0.5, and D's
        loss is 1.386, where D cannot tell them apart; at 0.9 and
        0.1, its targets, D has won
"""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common  # data sets, pictures and weights files
import training  # the frame of a run: epochs, history, checkpoints

# A key of your own goes into trainer_kwargs and the
# parameters of Trainer.__init__. One that shapes a
# network goes into model_kwargs, the parameters of
# Trainer.__init__, and the network, which for G is
# also built in load_generator.
# Checkpoints that were made without it are refused.
model_kwargs = {
    "latent_variable_size": 64,  # entries of the latent vector z ~ N(0, I)
    "discriminator_hidden_size": 256,  # width of the discriminator's two hidden layers
    "generator_hidden_size": 256,  # width of the generator's two hidden layers
    "image_size": 784,  # pixels of a flattened grey image: 784 is 28 x 28
}
# Your own images: a folder of them (dataset_type
# "folder"), or from Python any torch Dataset in
# place of "mnist": see `main`.
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | fashion_mnist | cifar10 | cub | sprites | folder | digits
    "batch_size": 16,  # images a step, in each process
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where data are, or are downloaded to; for folder, your images
    "allow_fallback": True,  # without data: the bundled digits, with a warning
}
trainer_kwargs = {
    "num_epochs": 200,  # may be raised later; 0 only checks settings and data
    "generator_lr": 0.0002,  # Adam's learning rate
    "discriminator_lr": 0.0002,  # Adam's learning rate
    "real_label": 0.9,  # target for real images; below 1, D does not grow too sure
    "fake_label": 0.1,  # target for generated images, above 0 for the same reason
    "output_dir": "mnist_GAN",  # everything is written there
}
run_kwargs = {
    "seed": 0,  # fixes weights, order and noise; a CPU run repeats exactly, also if continued
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
    "num_threads": 1,  # CPU threads; a second gains little here; 0: all cores
    "cuda_graph": True,  # on an NVIDIA GPU replay a recorded step: faster, see `step`
    "resume": True,  # go on from checkpoint.pt; false: start over; the old run is moved aside
    "sample_every": 50,  # epochs between pictures and weights; first and last have them
}


def check_settings(settings):
    """Refuse impossible values, in one line and before any work.

    settings: {key: value}. The keys of dataset_kwargs are
    checked by common.load_data, those of run_kwargs by
    training.Run. A common.BadInput ends with exit status 2.
    """
    for key in ("latent_variable_size", "discriminator_hidden_size", "generator_hidden_size"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    size = settings["image_size"]
    is_square = size >= 1 and math.isqrt(size) ** 2 == size
    squares = "a square number such as 784 (28 x 28) or 1024 (32 x 32)"
    common.require(is_square, f"image_size must be {squares}")
    common.require(settings["num_epochs"] >= 0, "num_epochs must be at least 0")
    for key in ("generator_lr", "discriminator_lr"):
        common.require(settings[key] > 0, f"{key} must be above 0")
    for key in ("real_label", "fake_label"):
        common.require(0 <= settings[key] <= 1, f"{key} must be between 0 and 1")


class Generator(nn.Module):
    """z (N, latent_variable_size) -> flattened
    image (N, image_size) in [-1, 1].
    """

    def __init__(self, latent_variable_size, generator_hidden_size, image_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_variable_size, generator_hidden_size),
            nn.ReLU(),
            nn.Linear(generator_hidden_size, generator_hidden_size),
            nn.ReLU(),
            nn.Linear(generator_hidden_size, image_size),
            nn.Tanh(),  # the range of the data
        )
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                # He et al. 2015. torch's own weights are 2.4
                # times smaller. With them D soon won on MNIST,
                # and the samples became nearly equal: at epoch
                # 13 the diversity (see `fit`) was 0.00001. With
                # He's it was 0.92 at epoch 4. D, which learnt
                # too fast as it was, keeps torch's.
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, z):
        return self.model(z)


class Discriminator(nn.Module):
    """Flattened image (N, image_size) -> logit (N,):
    its sigmoid is the probability of real.
    """

    def __init__(self, image_size, discriminator_hidden_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(image_size, discriminator_hidden_size),
            # negative inputs keep a gradient, which G learns from
            nn.LeakyReLU(0.2),
            nn.Linear(discriminator_hidden_size, discriminator_hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(discriminator_hidden_size, 1),
        )

    def forward(self, x):
        return self.model(x).squeeze(1)


# For another loss, change these two functions, and give another
# --output_dir. Where D's sigmoid is no longer a probability, leave
# it out in `step`, and change the titles in `draw_curves`. Both
# labels may need other values, too: 1 and 0 for the squares of
# LSGAN.


def discriminator_loss(real_logits, fake_logits, real_label, fake_label):
    """Cross-entropy of D in nats (natural logarithms).

    With targets 1 and 0 it is the negative of the paper's
    eq. (1), the game: min over G, max over D of
    E[log D(x)] + E[log(1 - D(G(z)))], for images x of the data
    and z ~ N(0, I).

    For a target t an image's loss is -t log D - (1 - t) log(1 - D),
    where D is the sigmoid of its logit. The mean over the real
    images and that over the generated ones are added. At D = 1/2
    everywhere the sum is 2 log 2 = 1.386, whatever the targets.
    With 0.9 and 0.1 it cannot fall below 0.650, where D answers
    0.9 and 0.1. torch computes it from the logit, since the log
    of a sigmoid that has rounded to 0 is infinite.
    """
    real_targets = torch.full_like(real_logits, real_label)
    fake_targets = torch.full_like(fake_logits, fake_label)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_targets)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_targets)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Non-saturating loss -log D(G(z)), mean over
    the batch (end of section 3 of the paper).

    The minimax form log(1 - D(G(z))) would hardly teach a bad G:
    its gradient with respect to the logit has size D(G(z)), which
    is near 0 just then. Here it is 1 - D(G(z)), near 1. The
    target is 1 and not real_label, since smoothing is to restrain
    D alone.
    """
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def mean_distance(images):
    """Mean Euclidean distance over all pairs of images (N, ...):
    0 when all are alike.
    """
    # on the CPU, since not every device has pdist
    return F.pdist(images.flatten(1).cpu()).mean().item()


def make_adam(network, lr):
    """Adam with beta1 0.5, as in DCGAN's
    paper, where 0.9 made training oscillate.

    lr: a tensor. `fused` updates all tensors of the network in one call.
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999), fused=True)


class Trainer:
    """Both networks, their optimisers, and the training loop.

    run: a training.Run. What `fit` uses of it:
    - run.epochs restores networks, optimisers, history and
      random numbers from checkpoint.pt, if there is one, and
      goes on from there. After each turn of the loop it writes
      checkpoint.pt, history.csv and run.html.
    - run.batches gives the batches of an epoch, in an order that
      depends on seed and epoch alone. The last one may be
      smaller, and is then never a recorded step (see `step`).
    - run.train_step calls `step` and keeps its scalars. run.step
      is the number of the step just done, from 0 in each epoch.
    - run.end_epoch adds a row to the history: the epoch, the name
      of the data set, the means of these scalars over the epoch's
      images, and what it is given. It returns all rows.
    - run.pictures_due is true every sample_every epochs, after
      the first and after the last.
    - run.save_weights writes what sampling needs: the network,
      model_kwargs, and which data it learnt from.

    At Ctrl-C the step under way is finished and
    checkpoint.pt is written; the same command goes on with
    the next step. A run that is killed loses the epoch
    under way. A loss that is no longer finite ends the run.

    Under torchrun each process has a batch, noise and,
    where there are GPUs, a GPU of its own. They share the
    images of an epoch, which has fewer steps then; the
    learning rates are not changed. All begin with equal
    networks, which stay equal: `step` averages the
    gradients over the processes. What `step` returns is
    in the history as a mean over them, what is given to
    run.end_epoch is the first one's. Only the first one
    writes files and prints. A run can be continued only
    with as many processes as it had.

    train: a common.Images, all of which lies on the device:
    train.pixels (M, 1, H, W) are all its images as uint8, and
    train.batch(index) gives those of index (N,) as floats in
    [-1, 1], and their labels. All is computed in float32: in
    bfloat16 a step of these small layers took 1.12 times as long.
    """

    def __init__(
        self,
        run,
        train,
        *,
        latent_variable_size,
        discriminator_hidden_size,
        generator_hidden_size,
        image_size,
        num_epochs,
        generator_lr,
        discriminator_lr,
        real_label,
        fake_label,
        output_dir,
    ):
        self.run, self.train = run, train
        self.latent_variable_size = latent_variable_size
        self.num_epochs, self.folder = num_epochs, Path(output_dir)
        self.real_label, self.fake_label = real_label, fake_label
        device = train.device
        generator = Generator(latent_variable_size, generator_hidden_size, image_size)
        discriminator = Discriminator(image_size, discriminator_hidden_size)
        self.generator = generator.to(device)
        self.discriminator = discriminator.to(device)
        # Tensors, so that a recorded step (see `step`) sees a new
        # rate. Adam holds these very tensors, also in a continued run.
        self.generator_lr = torch.tensor(generator_lr, device=device)
        self.discriminator_lr = torch.tensor(discriminator_lr, device=device)
        self.generator_optimizer = make_adam(self.generator, self.generator_lr)
        self.discriminator_optimizer = make_adam(self.discriminator, self.discriminator_lr)
        # By the seed the same latents in every epoch and run: 16
        # for the pictures, all for the diversity. It is measured
        # against the first 500 real images, which are a fair
        # sample, since load_data leaves nothing sorted.
        self.fixed_z = torch.randn(500, latent_variable_size).to(device)
        index = torch.arange(min(500, len(train)), device=device)
        real_images, _ = train.batch(index)
        self.real_distance = mean_distance(real_images) or float("nan")  # NaN if all are alike

    # On an NVIDIA GPU the work of one call of `step` is recorded
    # (a CUDA graph) and then repeated, with new noise but without
    # this Python: an `if` keeps the branch that was recorded, a
    # number keeps its value, and .item() is an error. So
    # keep in a tensor what changes, as the learning rate is.
    # --cuda_graph false turns the recording off.
    def step(self, real):
        """One step of D, then one of G.
        real (N, image_size) in [-1, 1]; returns scalars.

        For another column in history.csv add a tensor of shape ()
        to the dict that is returned; for a curve also to `panels`
        in draw_curves.
        """
        z = torch.randn(len(real), self.latent_variable_size, device=real.device)
        fake = self.generator(z)  # (N, image_size)

        # Real and generated images pass D in one batch, since it
        # has no batch norm that would mix them. With detach,
        # d_loss sends no gradient to G.
        logits = self.discriminator(torch.cat([real, fake.detach()]))  # (2N,)
        real_logits, fake_logits = logits.chunk(2)  # (N,) each
        d_loss = discriminator_loss(real_logits, fake_logits, self.real_label, self.fake_label)
        self.discriminator_optimizer.zero_grad()
        d_loss.backward()
        # torchrun: the mean over all processes; alone: nothing
        training.all_reduce_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()

        # G is judged by the D that has just learnt. With
        # `inputs` only G's weights get gradients, not D's.
        g_loss = generator_loss(self.discriminator(fake))
        self.generator_optimizer.zero_grad()
        g_loss.backward(inputs=list(self.generator.parameters()))
        training.all_reduce_gradients(self.generator_optimizer)
        self.generator_optimizer.step()

        return {
            "discriminator loss": d_loss,
            "generator loss": g_loss,
            "D(x)": real_logits.sigmoid().mean(),
            "D(G(z))": fake_logits.sigmoid().mean(),
        }

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_variable_size) ->
        grey images (N, 1, H, W) in [-1, 1].

        There is no dropout and no batch norm,
        so eval mode would make no difference.
        """
        return self.generator(z).unflatten(1, self.train.pixels.shape[1:])

    def fit(self):
        """Train to num_epochs.

        A checkpoint of other settings or data is refused; num_epochs,
        data_dir and the run_kwargs other than the seed may
        change. Changed code is not noticed: then give another
        --output_dir, or --resume false.
        """
        run = self.run
        state = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }
        for epoch in run.epochs(self.train, state, self.num_epochs):
            # A decay of the learning rate goes here. Compute it from
            # epoch (1, 2, ...), since a continued epoch runs this again:
            # first = run.settings["generator_lr"]
            # self.generator_lr.fill_(first * 0.99 ** (epoch - 1))
            # and the same for self.discriminator_lr.
            for images, _ in run.batches():  # (N, 1, H, W) in [-1, 1], on the device
                run.train_step(self.step, images.flatten(1))
                # pictures at steps 0, 100, ... go here:
                # if run.step % 100 == 0:
                #     self.draw(f"{epoch}_step_{run.step}")
            samples = self.sample(self.fixed_z)
            # 1: as varied as the data; towards 0: all alike (collapse); above 1: noise
            diversity = mean_distance(samples) / self.real_distance
            # another column, measured once an epoch, goes into this dict
            history = run.end_epoch({"diversity": diversity})
            if run.pictures_due:
                self.draw(epoch)
                self.draw_curves(history, epoch)
                run.save_weights(f"weights_epoch_{epoch}.pt", generator=self.generator)

    def draw(self, name):
        """Write sixteen samples as generated_image_epoch_{name}.png."""
        samples = self.sample(self.fixed_z[:16])
        common.save_grid(samples, self.folder / f"generated_image_epoch_{name}.png", columns=4)

    def draw_curves(self, history, epoch):
        """Write the history so far, a list
        of rows {column: value}, as curves.
        """
        panels = {
            "loss (nats)": ["discriminator loss", "generator loss"],
            "probability of being real": ["D(x)", "D(G(z))"],
            "mean distance, real images = 1": ["diversity"],
        }
        title = f"main_gan on {self.train.name}"
        common.save_curves(history, panels, title, self.folder / f"train_loss_curve_{epoch}.png")


def load_generator(weights_path):
    """The generator of a weights_epoch_{E}.pt.
    Raises common.BadInput for any other file.

    To sample, with 64 latents and 28 x 28 pixels:
        generator = main_gan.load_generator(path).requires_grad_(False)
        images = generator(torch.randn(16, 64)).unflatten(1, (1, 28, 28))
        common.save_grid(images, "samples.png", columns=4)
    """
    weights = common.load_weights(weights_path, __file__, "generator")
    kwargs = weights["model_kwargs"]
    generator = Generator(
        kwargs["latent_variable_size"], kwargs["generator_hidden_size"], kwargs["image_size"]
    )
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs):
    """Train with the given settings; returns the Trainer.

    dataset_kwargs["dataset_type"] may also be a torch Dataset of
    your own with a length, here or in the dict above. It gives
    (image, label). The image is Pillow's, or a tensor (C, H, W) of
    uint8 or of floats in [0, 1]; the label is an int from 0. Every
    image is resized, not cropped, brought to the network's
    channels and kept as uint8. A tenth of the images is held
    out, which this script has no use for. `dataset.classes`, if
    there is such a list, names the labels.
    """
    check_settings({**model_kwargs, **trainer_kwargs})
    # __file__: checkpoints and weights say which script wrote them
    run = training.Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
    # a GAN has no use for the test images
    train, _ = common.load_data(
        **dataset_kwargs,
        image_size=math.isqrt(model_kwargs["image_size"]),
        image_channels=1,
        device=run_kwargs["device"],
    )
    trainer = Trainer(run, train, **model_kwargs, **trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    # the options of the command line replace values of the dicts
    common.run_script(main, model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs)
