"""GAN, LSGAN, WGAN-GP or R3GAN on the
birds of CUB-200-2011 at 32x32 pixels.

paper:  GAN: Goodfellow et al. 2014,
        https://arxiv.org/abs/1406.2661
        LSGAN: Mao et al. 2016,
        https://arxiv.org/abs/1611.04076
        WGAN-GP and the networks: Gulrajani et al. 2017,
        https://arxiv.org/abs/1704.00028
        R3GAN: Huang et al. 2024,
        https://arxiv.org/abs/2501.05441
        R3GAN's pairs: Jolicoeur-Martineau 2018,
        https://arxiv.org/abs/1807.00734
        R3GAN's penalties R1 and R2: Mescheder et al. 2018,
        https://arxiv.org/abs/1801.04406
course: CMU 16-824, Visual Learning and Recognition,
        spring 2022, assignment 3
run:    python gan_cub.py                       (all keys of the dicts are options)
        python gan_cub.py --experiment losses   (all four in turn, compared)
        python gan_cub.py --experiment r3gan    (its pairs and its penalties, alone and together)
        torchrun --nproc_per_node=2 gan_cub.py  (two processes, a batch each)
        python fid.py --generated cub_GAN/weights_best.pt --num_images 50000
writes: cub_GAN/. After every period of sample_every iterations:
        history.csv, run.html (open it to watch: pictures and
        curves), checkpoint.pt (also at Ctrl-C; the same command
        continues from it), samples_{I}.png,
        interpolations_{I}.png, fid_vs_iterations.png (the curves
        and the score; train_loss_curve.png if there is no
        score), weights_iteration_{I}.pt and, of the best score,
        weights_best.pt (both for sampling). An experiment makes
        such a folder for each setting in there, and writes
        {experiment}.png and {experiment}.csv beside them
differs from the papers: networks, Adam, the rate that falls
        to 0 and the five steps of D are those of the course, for
        all losses, so that they can be compared (r3gan takes one
        step of D). D sums its last map over all positions, as in
        the course; Gulrajani et al. take the mean
differs from the course: pictures, scores and weights are of an
        averaged G, which is steadier; G has the non-saturating
        loss in gan; the images are without JPEG's artefacts;
        r3gan is added
expect: the default run needs a GPU, and was not tried. Much
        smaller runs, on 5,430 birds of CUB-200 of 2010, are
        python gan_cub.py --experiment losses
            --dataset_type folder --data_dir FOLDER
            --feature_maps 32 --batch_size 32 --lr 0.0008
            --num_iterations 4500 --sample_every 500
            --score_features classifier --score_images 2000
            --precision bfloat16
        with seed 0; half an hour for the four on one core of an
        AMD EPYC. D's mean loss in the first period; then, of the
        last one, D's and G's mean loss, the diversity, and the
        classifier distance (lower is better):
                 D first  D last  G last  diversity  distance
        gan         1.22    0.46    2.58       0.84       908
        lsgan       0.32    0.07    0.38       0.83       742
        wgan-gp    -3.85   -2.18   -6.57       0.96       268
        r3gan       0.71    0.64    0.77       0.97       397
        In gan and lsgan D wins, and the images stay bad. In r3gan
        it hardly tells a pair apart. In wgan-gp the penalty falls
        from 0.08 to 0.016. r3gan with lr 0.0004 reaches 412 after
        4,500 iterations, and 236 after 16,000, 41 min. After
        30,000, with lr 0.0002, gan is at 909, lsgan at 560,
        wgan-gp at 210 and r3gan at 267 (25, 24, 46, 88 min).
        r3gan with feature_maps 64, horizontal_flip and lr 0.0002
        is at 164 after 21,000, 146 min; with lr 0.0004 such a run
        may lose its D, which becomes constant
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common  # data sets, pictures and weights files
import fid  # scores
import training  # the frame of a run: epochs, history, checkpoints

# A key of your own goes into trainer_kwargs and the
# parameters of Trainer.__init__. One that shapes a
# network goes into model_kwargs, the parameters of
# Trainer.__init__ and of make_networks, and the
# network; for G also into load_generator.
# Checkpoints that were made without it are refused.
model_kwargs = {
    "latent_dim": 128,  # entries of the latent vector z ~ N(0, I); at least 2
    "feature_maps": 128,  # channels of every layer, in both networks
}
# Your own images: a folder of them (dataset_type "folder"), or
# from Python any torch Dataset in place of "cub": see `main`.
dataset_kwargs = {
    "dataset_type": "cub",  # mnist | fashion_mnist | cifar10 | cub | sprites | folder | digits
    "batch_size": 256,  # images an iteration, in each process
    "data_dir": "data",  # where data are, or are downloaded to; for folder, your images
    "allow_fallback": True,  # without data: the bundled digits, with a warning
    "image_size": 32,  # 16 | 32 | 64 pixels a side; cub is squeezed, not cropped
    "jpeg_quality": 0,  # of cub only: 75 compresses as the course did; 0: not at all
    "horizontal_flip": False,  # mirror training images with probability 1/2: not for digits
}
trainer_kwargs = {
    "loss": "wgan-gp",  # gan | lsgan | wgan-gp | r3gan; see LOSSES
    "num_iterations": 30000,  # steps of D, over which the learning rate falls to 0
    "d_steps": 0,  # steps of D for one of G, a divisor of sample_every; 0: see LOSS_DEFAULTS
    "lr": 0.0002,  # Adam's learning rate at the start, of both networks
    "penalty_weight": -1.0,  # of the penalty on D's slope; 0: none; -1: see LOSS_DEFAULTS
    "ema_decay": 0.999,  # the averaged G is shown, saved and scored; 0: G itself
    "precision": "auto",  # auto | float32 | bfloat16; auto: bfloat16 where it is fast
    "score_features": "auto",  # inception (the FID) | classifier | auto: see make_scorer
    "score_images": 10000,  # images that are generated for a score; 0: no scores
    "output_dir": "cub_GAN",  # everything is written there
}
run_kwargs = {
    "seed": 0,  # fixes weights, order and noise; a CPU run repeats exactly, also if continued
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
    "num_threads": 0,  # CPU threads; 0 is torch's choice, all cores
    "cuda_graph": True,  # on an NVIDIA GPU replay a recorded step: faster, see `step`
    "resume": True,  # go on from checkpoint.pt; false: start over; the old run is moved aside
    "sample_every": 1000,  # iterations between scores, pictures and weights
}
experiment_kwargs = {
    "experiment": "none",  # none | losses | r3gan: trains several and compares
}
# What suits each loss: the course's settings; for r3gan one step
# of each network, as in Huang et al., and a weight that suits the
# birds. The weight is lambda in wgan-gp; in every other loss it
# is gamma, of R1 and R2 (see zero_centred_penalty).
LOSS_DEFAULTS = {
    "gan": {"d_steps": 5, "penalty_weight": 0.0},
    "lsgan": {"d_steps": 5, "penalty_weight": 0.0},
    "wgan-gp": {"d_steps": 5, "penalty_weight": 10.0},
    "r3gan": {"d_steps": 1, "penalty_weight": 1.0},
}
# The settings of each experiment, keys of trainer_kwargs, by the
# names of their folders; everything else is as in the dicts or on
# the command line. All have the same iterations and lr; so r3gan,
# with one step of D for one of G, has five times the steps of G.
EXPERIMENTS = {
    "losses": {
        "gan": {"loss": "gan"},
        "lsgan": {"loss": "lsgan"},
        "wgan-gp": {"loss": "wgan-gp"},
        "r3gan": {"loss": "r3gan"},
    },
    "r3gan": {
        "pairs": {"loss": "r3gan", "d_steps": 1, "penalty_weight": 0.0},
        "penalties": {"loss": "gan", "d_steps": 1, "penalty_weight": 1.0},
        "both": {"loss": "r3gan", "d_steps": 1, "penalty_weight": 1.0},
    },
}


def suit_loss(loss, d_steps, penalty_weight):
    """(d_steps, penalty_weight) as given, or,
    where they are 0 and -1, what suits the loss.
    """
    suitable = LOSS_DEFAULTS[loss]
    if d_steps == 0:
        d_steps = suitable["d_steps"]
    if penalty_weight == -1:
        penalty_weight = suitable["penalty_weight"]
    return d_steps, penalty_weight


def check_settings(settings):
    """Refuse impossible values, in one line and before any work.

    settings: {key: value}. The other keys of dataset_kwargs are
    checked by common.load_data, those of run_kwargs by
    training.Run. A common.BadInput ends with exit status 2.
    """
    common.require(settings["latent_dim"] >= 2, "latent_dim must be at least 2")
    common.require(settings["image_size"] in (16, 32, 64), "image_size must be 16, 32 or 64")
    common.require(settings["loss"] in LOSSES, f"loss must be one of {', '.join(LOSSES)}")
    for key in ("feature_maps", "sample_every"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    common.require(settings["num_iterations"] >= 0, "num_iterations must be at least 0")
    common.require(settings["d_steps"] >= 0, "d_steps must be at least 1, or 0 for the loss's own")
    weight = settings["penalty_weight"]
    message = "penalty_weight must be at least 0, or -1 for the loss's own"
    common.require(weight >= 0 or weight == -1, message)
    common.require(settings["lr"] > 0, "lr must be above 0")
    common.require(0 <= settings["ema_decay"] < 1, "ema_decay must be at least 0 and below 1")
    legal = {
        "precision": ("auto", "float32", "bfloat16"),
        "score_features": ("auto", "inception", "classifier"),
        "experiment": ("none", *EXPERIMENTS),
    }
    for key, values in legal.items():
        common.require(settings[key] in values, f"{key} must be one of {', '.join(values)}")
    count = settings["score_images"]
    common.require(count == 0 or count >= 2, "score_images must be at least 2, or 0 for no scores")
    every = settings["sample_every"]
    divides = settings["num_iterations"] % every == 0
    common.require(divides, f"num_iterations must be a multiple of sample_every, {every}")
    if settings["experiment"] == "none":  # an experiment's settings are checked in their turn
        d_steps, _ = suit_loss(settings["loss"], settings["d_steps"], weight)
        message = f"sample_every must be a multiple of d_steps, {d_steps}"
        common.require(every % d_steps == 0, message)


class ResBlockUp(nn.Module):
    """The generator's block:
    (N, channels, H, W) -> (N, channels, 2H, 2W).
    """

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            # no bias: the batch norm that follows would undo it
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),  # (N, channels, 2H, 2W)
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )
        # A 1x1 convolution before the upsampling gives the same
        # as after it, at a quarter of the cost.
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=1),
            nn.Upsample(scale_factor=2, mode="nearest"),  # (N, channels, 2H, 2W)
        )

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class FirstResBlock(nn.Module):
    """The discriminator's first block:
    images (N, C, H, W) -> (N, channels, H/2, W/2).
    """

    def __init__(self, image_channels, channels):
        super().__init__()
        self.residual = nn.Sequential(
            # no ReLU comes first: it would lose the darker half of the pixels
            nn.Conv2d(image_channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (N, channels, H/2, W/2)
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2),  # (N, C, H/2, W/2)
            nn.Conv2d(image_channels, channels, kernel_size=1),
        )

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class ResBlockDown(nn.Module):
    """A block of the discriminator:
    (N, channels, H, W) -> (N, channels, H/2, W/2).
    """

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (N, channels, H/2, W/2)
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2),  # (N, channels, H/2, W/2)
            nn.Conv2d(channels, channels, kernel_size=1),
        )

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class ResBlock(nn.Module):
    """A block of the discriminator that keeps the size:
    (N, channels, H, W) -> the same.
    """

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x):
        return self.residual(x) + x


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, W) float32 in [-1, 1]."""

    def __init__(self, latent_dim, feature_maps, image_channels, image_size):
        super().__init__()
        layers = [
            nn.Linear(latent_dim, feature_maps * 4 * 4),
            nn.Unflatten(1, (feature_maps, 4, 4)),  # (N, 128, 4, 4)
        ]
        doublings = int(math.log2(image_size // 4))  # 3 at 32 pixels
        for _ in range(doublings):
            layers.append(ResBlockUp(feature_maps))  # (N, 128, 8, 8), then 16, then 32
        layers += [
            nn.BatchNorm2d(feature_maps),
            nn.ReLU(),
            nn.Conv2d(feature_maps, image_channels, kernel_size=3, padding=1),  # (N, 3, 32, 32)
        ]
        self.model = nn.Sequential(*layers)

    def forward(self, z):
        return self.model(z).float().tanh()  # float32, even if the layers compute in bfloat16


class Discriminator(nn.Module):
    """Images (N, C, H, W) in [-1, 1] ->
    logit (N,) float32, high for real ones.

    There is no batch norm: the penalty is on the gradient of one
    image's logit, which must not depend on the other images.
    """

    def __init__(self, feature_maps, image_channels, image_size):
        super().__init__()
        layers = [FirstResBlock(image_channels, feature_maps)]  # (N, 128, 16, 16)
        halvings = int(math.log2(image_size // 16))  # 1 at 32 pixels
        for _ in range(halvings):
            layers.append(ResBlockDown(feature_maps))  # (N, 128, 8, 8)
        layers += [ResBlock(feature_maps), ResBlock(feature_maps), nn.ReLU()]
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(feature_maps, 1)

    def forward(self, x):
        # the sum of 64 places is in float32, since bfloat16 has
        # three digits; the linear layer may be in bfloat16 again
        features = self.blocks(x).float().sum(dim=(2, 3))  # (N, 128)
        return self.linear(features).squeeze(1).float()


def gan_discriminator_loss(real_logits, fake_logits):
    """-log D(x) - log(1 - D(G(z))), where D is the
    sigmoid of the logit; Goodfellow et al., eq. (1).

    Both terms are means over the batch, here and below. It is
    2 log 2 = 1.386 where D cannot tell the two apart and is 1/2
    everywhere; it is less where D can. torch computes it from the
    logit, since the log of a sigmoid that has rounded to 0 is
    infinite.
    """
    real_targets, fake_targets = torch.ones_like(real_logits), torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_targets)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_targets)
    return real_loss + fake_loss


def gan_generator_loss(fake_logits):
    """Non-saturating loss -log D(G(z)):
    Goodfellow et al., end of section 3.

    Its gradient stays large where D rejects the images; that
    of the minimax form, log(1 - D(G(z))), goes to 0 there.
    """
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def lsgan_discriminator_loss(real_logits, fake_logits):
    """(D(x) - 1)^2 / 2 + D(G(z))^2 / 2, where D is the logit;
    Mao et al., eq. (2) with a = 0, b = 1.

    The square pulls logits to 1 and 0, where the cross-entropy
    rewards ever larger ones. It is 1/4 where D cannot tell the
    two apart and is 1/2 everywhere.
    """
    real_loss = F.mse_loss(real_logits, torch.ones_like(real_logits))
    fake_loss = F.mse_loss(fake_logits, torch.zeros_like(fake_logits))
    return 0.5 * real_loss + 0.5 * fake_loss


def lsgan_generator_loss(fake_logits):
    """(D(G(z)) - 1)^2 / 2, where D is the logit;
    Mao et al., eq. (2) with c = 1.

    The authors' argument: images far from 1 are still pulled where
    they fool D already, where the cross-entropy's gradient fades.
    """
    return 0.5 * F.mse_loss(fake_logits, torch.ones_like(fake_logits))


def wgan_discriminator_loss(real_logits, fake_logits):
    """D(G(z)) - D(x), where D is the logit;
    Gulrajani et al., eq. (3), to which the penalty is added.

    Only the difference counts, so the level of the logits may
    drift. The loss is usually negative, and comes nearer to 0 as
    G improves.
    """
    return fake_logits.mean() - real_logits.mean()


def wgan_generator_loss(fake_logits):
    """-D(G(z)), where D is the logit; Gulrajani et al., algorithm 1."""
    return -fake_logits.mean()


def r3gan_discriminator_loss(real_logits, fake_logits):
    """softplus(D(G(z)) - D(x)), where D is the logit;
    Huang et al., eq. (2).

    D need not say how real an image is, only which image of a
    pair is the real one: of the i-th real and the i-th generated.
    The authors' argument: every real image is compared with a
    generated one, so a G that leaves out a kind of images loses
    those pairs.
    softplus(t) = log(1 + e^t), mean over the pairs:
    log 2 = 0.693 where D cannot tell.
    """
    return F.softplus(fake_logits - real_logits).mean()


def r3gan_generator_loss(real_logits, fake_logits):
    """softplus(D(x) - D(G(z))): the same pairs, with the roles exchanged.

    It is the non-saturating form of Huang et al., eq. (2):
    not D's loss with its sign changed. Mean over the pairs.
    """
    return F.softplus(real_logits - fake_logits).mean()


# The key "loss" chooses a line here. To add a loss, write its two
# functions above, its line below and one in LOSS_DEFAULTS, and
# name it in the comment of the key; one in EXPERIMENTS compares
# it with the others. A penalty_weight above 0 adds
# R1 and R2 to every loss but wgan-gp. For another penalty follow
# "wgan-gp" in discriminator_step, and for a loss of G that takes
# the real logits too, "r3gan" in generator_step.
LOSSES = {
    "gan": (gan_discriminator_loss, gan_generator_loss),
    "lsgan": (lsgan_discriminator_loss, lsgan_generator_loss),
    "wgan-gp": (wgan_discriminator_loss, wgan_generator_loss),
    "r3gan": (r3gan_discriminator_loss, r3gan_generator_loss),
}


def gradient_penalty(critic, real, fake, epsilon):
    """(|gradient of the critic at epsilon x +
    (1 - epsilon) G(z)| - 1)^2, mean over the batch.

    Gulrajani et al., eq. (3); the norm is over C, H and W. The
    critic, as a WGAN's D is called, is held to a slope near 1:
    without a bound it could lower its loss for ever. The gradient
    is taken between real and generated images, because an optimal
    critic has slope 1 on the straight lines that join them as
    optimal transport pairs them; the paper's pairs are random,
    and so are these. real, fake (N, C, H, W); epsilon
    (N, 1, 1, 1) in [0, 1).
    """
    mixed = epsilon * real + (1 - epsilon) * fake  # (N, C, H, W)
    mixed = mixed.detach().requires_grad_()
    # The gradient of the sum holds, for each
    # image, the gradient of its own logit.
    total = critic(mixed).sum()
    (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)  # (N, C, H, W)
    norms = gradient.flatten(1).norm(dim=1)  # (N,)
    return (norms - 1).square().mean()


def zero_centred_penalty(images, logits):
    """|gradient of D|^2, D the logit, mean over real and
    generated images together: (R1 + R2) / gamma.

    Mescheder et al., eqs. (9) and (10): R1 is gamma / 2 times the
    mean of |gradient|^2 over the N real images, R2 the same over
    the N generated ones. So R1 + R2 is gamma, our penalty_weight,
    times the mean over all 2N, which is returned. Unlike that of
    wgan-gp, this penalty draws the slope to 0: once G is perfect
    a constant D is best, and training can come to rest. images
    (2N, C, H, W) are N real and N generated ones, and require a
    gradient; logits (2N,) are D's of them.
    """
    # As above, an image's gradient is that of its own logit.
    total = logits.sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)  # (2N, C, H, W)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def mean_distance(images):
    """Mean Euclidean distance over all pairs of images (N, ...):
    0 when all are alike.
    """
    # on the CPU, since not every device has pdist
    return F.pdist(images.flatten(1).cpu()).mean().item()


def make_networks(latent_dim, feature_maps, image_shape, device):
    """(generator, its average, discriminator)
    for images of shape (C, H, W), on the device.

    They start from torch's default random weights, as in the
    course: uniform within 1 / sqrt(inputs of a unit) of 0.
    """
    image_channels, image_size, _ = image_shape
    generator = Generator(latent_dim, feature_maps, image_channels, image_size)
    ema_generator = Generator(latent_dim, feature_maps, image_channels, image_size)
    ema_generator.load_state_dict(generator.state_dict())
    # .eval(): batch norm takes its running
    # statistics, averaged as the weights are, so that
    # no picture depends on the others of its batch
    ema_generator.requires_grad_(False).eval()
    discriminator = Discriminator(feature_maps, image_channels, image_size)
    networks = [generator, ema_generator, discriminator]
    # In memory the channels of a pixel lie side by
    # side, which makes convolutions faster.
    return [network.to(device, memory_format=torch.channels_last) for network in networks]


def make_adam(network, lr):
    """Adam with the betas of Gulrajani et al., algorithm 1:
    no momentum. lr: a tensor. `fused` updates all tensors of
    a network at once.
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.9), fused=True)


def steps_taken(optimizer):
    """How many steps an Adam has taken, by its own counter:
    a tensor on the device.
    """
    first_parameter = optimizer.param_groups[0]["params"][0]
    return optimizer.state[first_parameter]["step"]


def make_scorer(train, score_features, score_images):
    """What measures how far generated images are from `train`.
    None: no scores.

    A network that was trained to classify turns each image into
    a vector, its features. The mean and covariance of those of
    all images of `train` and of score_images generated ones are
    compared: that is the Frechet distance, and less is better.
    With Inception as this network it is the FID; with a small
    classifier that is trained on `train` it is the "classifier
    distance", which compares only with others by the same
    classifier. auto takes Inception, if its weights are in
    data_dir or can be downloaded. The classifier is trained from
    a fixed seed and kept in data_dir, so that all runs on the
    same data have the same. See fid.py.
    """
    if score_images == 0:
        return None
    try:
        return fid.Scorer(train, features=score_features, num_images=score_images)
    except ValueError as error:  # no Inception file, and a classifier needs two classes
        if score_features != "auto":
            raise
        print(f"WARNING: NO SCORES. {error}.", file=sys.stderr, flush=True)
        return None


def keep_to_score(history, scorer):
    """The scorer, if it gives the score that the run has so far;
    None, if the run has none.

    Another score is refused: other distances mean other things.
    """
    if not history:
        return scorer
    before = [name for name in ("FID", "classifier distance") if name in history[0]]
    if not before:
        return None
    now = scorer.name if scorer else "no score"
    message = f"the run has the {before[0]} so far, and would go on with {now}"
    advice = "choose by --score_features, or give another --output_dir"
    common.require(now == before[0], f"{message}; {advice}")
    return scorer


class Trainer:
    """The networks, their optimisers, and the training loop.

    An iteration is one step of D. One call of `step` is
    d_steps iterations and one step of G. A period is
    sample_every iterations, and is what run calls an epoch.

    run: a training.Run. What `fit` uses of it:
    - run.epochs restores networks, optimisers, history and
      random numbers from checkpoint.pt, if there is one, and
      goes on from there. After each turn of the loop it writes
      checkpoint.pt, history.csv and run.html.
    - run.batches gives the batches of a period, each of d_steps
      times batch_size images. These come in an order that depends
      on the seed alone, a new one in each pass; a batch may reach
      from one pass into the next.
    - run.train_step calls `step` and keeps its scalars. run.step
      is the number of the call just done, from 0 in each period.
    - run.end_epoch adds a row to the history: the iteration, the
      name of the data set, the means of these scalars, and what
      it is given. It returns all rows.
    - run.save_weights writes what sampling needs: the network,
      model_kwargs, and which data it learnt from.

    At Ctrl-C the step under way is finished and checkpoint.pt is
    written; the same command goes on with the next step. A run
    that is killed loses the period under way. A loss that is no
    longer finite ends the run.

    Under torchrun each process has a batch, noise and, where
    there are GPUs, a GPU of its own. The learning rate is not
    changed, and a period has as many iterations. All begin
    with equal networks, which stay equal: `step` averages the
    gradients over the processes, and training.Run averages
    batch norm's running statistics. What `step` returns is in
    the history as a mean over them; diversity and score are
    the first one's. Only the first one writes files and
    prints. A run can be continued only with as many processes
    as it had.

    train: a common.Images, all of which lies on the device:
    train.pixels (M, C, H, W) are all its images as uint8, and
    train.batch(index) gives those of index (N,) as floats in
    [-1, 1], and their labels.
    """

    def __init__(
        self,
        run,
        train,
        *,
        latent_dim,
        feature_maps,
        loss,
        num_iterations,
        d_steps,
        lr,
        penalty_weight,
        ema_decay,
        precision,
        score_features,
        score_images,
        output_dir,
        sample_every,
    ):
        self.run, self.folder, self.latent_dim = run, Path(output_dir), latent_dim
        self.num_iterations, self.sample_every = num_iterations, sample_every
        self.loss, self.ema_decay = loss, ema_decay
        self.discriminator_loss, self.generator_loss = LOSSES[loss]
        self.d_steps, self.penalty_weight = suit_loss(loss, d_steps, penalty_weight)
        # One call of `step` takes the batches of d_steps iterations at once.
        self.train = dataclasses.replace(train, batch_size=train.batch_size * self.d_steps)
        count = score_images if num_iterations else 0  # untrained networks are not scored
        self.scorer = make_scorer(train, score_features, count)
        self.bfloat16 = common.use_bfloat16(precision, train.device)
        networks = make_networks(latent_dim, feature_maps, train.pixels.shape[1:], train.device)
        self.generator, self.ema_generator, self.discriminator = networks
        self.first_lr = lr
        # A tensor (see `step`). Both Adams hold it, also in a continued run.
        self.lr = torch.tensor(lr, device=train.device)
        self.generator_optimizer = make_adam(self.generator, self.lr)
        self.discriminator_optimizer = make_adam(self.discriminator, self.lr)
        # for all pictures, so that they can be compared; drawn
        # on the CPU, so that it does not depend on the device
        self.fixed_z = torch.randn(100, latent_dim).to(train.device)

    def autocast(self):
        """Inside, layers compute in bfloat16 if asked to;
        weights and losses stay float32.
        """
        # no cache of weights in bfloat16, since D changes within a step
        kind = self.train.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False)

    # On an NVIDIA GPU the work of one call of `step` is recorded
    # (a CUDA graph) and then repeated, with new noise but without
    # this Python: an `if` keeps the branch that was recorded, a
    # number keeps its value, and .item() is an error. So
    # keep in a tensor what changes, as the learning rate is.
    # --cuda_graph false turns the recording off.
    def step(self, real):
        """d_steps iterations, then one step of G.
        real (d_steps * N, C, H, W) in [-1, 1].

        For another column in history.csv add a tensor of shape ()
        to the dict that is returned here or by
        discriminator_step. For a scalar of generator_step, return it
        there beside the loss, and unpack it here. For a curve add
        it to `panels` in draw_curves.
        """
        rows = []
        parts = real.chunk(self.d_steps)  # (N, C, H, W) each
        with self.autocast():
            for part in parts:
                rows.append(self.discriminator_step(part))
            g_loss = self.generator_step(parts[-1])
        self.update_ema()

        # The rate falls linearly to 0. This sets the next call's; the
        # first call has `lr`. For another decay replace the factor
        # (1 - ...), for example by 0.98 ** (done // 1000). `done` is a
        # tensor, so its cosine is torch.cos(...).
        done = steps_taken(self.discriminator_optimizer)  # iterations
        self.lr.copy_(self.first_lr * (1 - done / self.num_iterations))

        values = {}
        for name in rows[0]:
            values[name] = torch.stack([row[name] for row in rows]).mean()
        values["generator loss"] = g_loss
        return values

    def discriminator_step(self, real):
        """One step of D on real (N, C, H, W) in [-1, 1]:
        an iteration. Returns scalars.
        """
        with torch.no_grad():  # this loss teaches only D
            z = torch.randn(len(real), self.latent_dim, device=real.device)
            fake = self.generator(z)  # (N, C, H, W)

        # D sees both halves in one pass, which is safe without batch norm.
        images = torch.cat([real, fake]).requires_grad_()  # (2N, C, H, W); for R1 and R2
        logits = self.discriminator(images)  # (2N,)
        real_logits, fake_logits = logits.chunk(2)  # (N,) each
        loss = self.discriminator_loss(real_logits, fake_logits)
        values = {
            "discriminator loss": loss,  # without the penalty, which has its own column
            "real logit": real_logits.mean(),
            "fake logit": fake_logits.mean(),
        }
        if self.penalty_weight > 0:
            if self.loss == "wgan-gp":
                epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
                penalty = gradient_penalty(self.discriminator, real, fake, epsilon)
            else:
                penalty = zero_centred_penalty(images, logits)
            values["gradient penalty"] = penalty
            loss = loss + self.penalty_weight * penalty
        self.discriminator_optimizer.zero_grad()
        # `inputs` leaves out the gradient of the images, here not needed
        loss.backward(inputs=list(self.discriminator.parameters()))
        # torchrun: the mean over all processes; alone: nothing
        training.all_reduce_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()
        return values

    def generator_step(self, real):
        """One step of G on as many images as there
        are in real (N, C, H, W); returns its loss.
        """
        z = torch.randn(len(real), self.latent_dim, device=real.device)
        fake_logits = self.discriminator(self.generator(z))  # (N,)
        if self.loss == "r3gan":
            with torch.no_grad():  # G cannot change these
                real_logits = self.discriminator(real)  # (N,)
            loss = self.generator_loss(real_logits, fake_logits)
        else:
            loss = self.generator_loss(fake_logits)
        self.generator_optimizer.zero_grad()
        # `inputs` leaves out the gradients of D's weights, not needed here
        loss.backward(inputs=list(self.generator.parameters()))
        training.all_reduce_gradients(self.generator_optimizer)
        self.generator_optimizer.step()
        return loss

    @torch.no_grad()
    def update_ema(self):
        """ema = decay ema + (1 - decay) G, for
        weights and for batch norm's statistics.

        After t steps of G the decay is (1 + t) / (10 + t), at
        most ema_decay, so that the first weights are soon
        forgotten.
        """
        t = steps_taken(self.generator_optimizer)
        weight = (9 / (10 + t)).clamp(min=1 - self.ema_decay)  # 1 - decay
        averaged = self.ema_generator.state_dict()  # the very tensors of the network
        for name, value in self.generator.state_dict().items():
            if value.is_floating_point():  # counters are not averaged
                averaged[name].lerp_(value, weight)

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_dim) -> images (N, C, H, W)
        in [-1, 1] of the averaged generator.
        """
        with self.autocast():
            return self.ema_generator(z)

    def generate(self, index):
        """As many new images as index (N,) has entries:
        the scorer calls this as it calls train.batch.
        """
        return self.sample(torch.randn(len(index), self.latent_dim).to(self.train.device))

    def fit(self):
        """Train to num_iterations, in periods of sample_every iterations.

        A checkpoint of other settings or data is refused; precision,
        score_features, data_dir and the run_kwargs other than seed and
        sample_every may change. Changed code is not noticed: then
        give another --output_dir, or --resume false. More
        iterations than were planned need a new run, too, since by
        them the learning rate falls to 0.
        """
        run = self.run
        state = {
            "generator": self.generator,
            "ema_generator": self.ema_generator,
            "discriminator": self.discriminator,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }
        periods = self.num_iterations // self.sample_every
        size = self.sample_every
        calls = size // self.d_steps  # of `step` in a period
        # unit and unit_size only change what is written: after
        # period p it says "iteration" p * size
        epochs = run.epochs(
            self.train, state, periods, steps=calls, unit="iteration", unit_size=size
        )
        for period in epochs:
            # here, since it is run.epochs that restores the history
            self.scorer = keep_to_score(self.run.history, self.scorer)
            for images, _ in run.batches():  # (d_steps * N, C, H, W) in [-1, 1]
                run.train_step(self.step, images)
                # pictures every 100 iterations go here:
                # done = (run.step + 1) * self.d_steps  # it grows by d_steps
                # if done % 100 < self.d_steps:
                #     self.draw((period - 1) * size + done)
            self.evaluate(period * size)

    def evaluate(self, iteration):
        """This iteration's row of the
        history, its weights and its pictures.
        """
        run = self.run
        # of the first hundred real images: load_data leaves nothing sorted
        index = torch.arange(min(100, len(self.train)), device=self.train.device)
        real_images, _ = self.train.batch(index)
        real_distance = mean_distance(real_images) or float("nan")  # NaN if all are alike
        # 1: as varied as the data; towards 0: all alike
        # (mode collapse); above 1: often noise. For another column,
        # measured once a period, add it to this dict.
        measured = {"diversity": mean_distance(self.sample(self.fixed_z)) / real_distance}
        if self.scorer:
            measured |= self.scorer(self.generate)  # {name of the distance: value}
        history = run.end_epoch(measured)
        run.save_weights(f"weights_iteration_{iteration}.pt", generator=self.ema_generator)
        if self.scorer:
            scores = [row[self.scorer.name] for row in history]
            if scores[-1] == min(scores):  # the best so far
                run.save_weights("weights_best.pt", generator=self.ema_generator)
        self.draw(iteration)
        self.draw_curves(history)

    def draw(self, name):
        """Write a hundred samples, and the first
        of them with its first two latents swept.
        """
        samples = self.sample(self.fixed_z)
        common.save_grid(samples, self.folder / f"samples_{name}.png", columns=10)
        values = torch.linspace(-1, 1, 10, device=self.train.device)
        plane = self.fixed_z[:1].repeat(100, 1)  # (100, latent_dim)
        # the first latent grows down the picture, the second to the right
        plane[:, :2] = torch.cartesian_prod(values, values)
        samples = self.sample(plane)
        common.save_grid(samples, self.folder / f"interpolations_{name}.png", columns=10)

    def draw_curves(self, history):
        """Write the history so far, a list
        of rows {column: value}, as curves.
        """
        panels = {
            "loss": ["discriminator loss", "generator loss"],
            "mean logit": ["real logit", "fake logit"],
            "mean distance, real images = 1": ["diversity"],
        }
        if self.penalty_weight > 0:
            panels["penalty, before its weight"] = ["gradient penalty"]
        name = "train_loss_curve.png"
        if self.scorer:
            label = f"{self.scorer.name} (N {self.scorer.num_images:,})"
            panels = {label: [self.scorer.name], **panels}
            name = "fid_vs_iterations.png"
        title = f"gan_cub ({self.loss}) on {self.train.name}"
        common.save_curves(history, panels, title, self.folder / name)


def load_generator(weights_path):
    """The generator of a weights_iteration_{I}.pt or weights_best.pt.
    Raises common.BadInput.

    To sample, with 128 latents:
        generator = gan_cub.load_generator(path).requires_grad_(False)
        images = generator(torch.randn(16, 128))  # (16, 3, 32, 32)
        common.save_grid(images, "samples.png", columns=4)
    """
    weights = common.load_weights(weights_path, __file__, "generator")
    image_channels, image_size, _ = weights["data"]["shape"]
    kwargs = weights["model_kwargs"]
    generator = Generator(kwargs["latent_dim"], kwargs["feature_maps"], image_channels, image_size)
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(
    model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment_kwargs=experiment_kwargs
):
    """Train with the given settings;
    returns the Trainer, or {name: Trainer} of an experiment.

    dataset_kwargs["dataset_type"] may also be a torch Dataset of
    your own with a length, here or in the dict above. It gives
    (image, label). The image is Pillow's, or a tensor (C, H, W) of
    uint8 or of floats in [0, 1]; the label is an int from 0. Every
    image is resized, not cropped, brought to three channels and
    kept as uint8. A tenth of the images is held out, which this
    script has no use for. `dataset.classes`, if there is such a
    list, names the labels.
    """
    check_settings(
        {**model_kwargs, **dataset_kwargs, **trainer_kwargs, **run_kwargs, **experiment_kwargs}
    )
    if experiment_kwargs["experiment"] != "none":
        return compare(
            model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, **experiment_kwargs
        )
    # __file__: checkpoints and weights say which script wrote them
    run = training.Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
    # one channel for these two, three for all others
    grey = dataset_kwargs["dataset_type"] in ("mnist", "fashion_mnist")
    train, _ = common.load_data(
        **dataset_kwargs,
        shuffle=True,  # a new order at each pass
        image_channels=1 if grey else 3,
        device=run_kwargs["device"],
    )
    sample_every = run_kwargs["sample_every"]
    trainer = Trainer(run, train, **model_kwargs, **trainer_kwargs, sample_every=sample_every)
    trainer.fit()
    return trainer


def compare(model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment):
    """Train each setting in a folder of its own, unless it is
    trained already; then compare them.

    Returns {name: Trainer}.
    """
    folder = Path(trainer_kwargs["output_dir"])
    trainers = {}  # {name: Trainer}
    for name, changes in EXPERIMENTS[experiment].items():
        print(f"{experiment}: {name}", flush=True)
        changed = {**trainer_kwargs, **changes, "output_dir": str(folder / name)}
        alone = {"experiment": "none"}
        trainers[name] = main(model_kwargs, dataset_kwargs, changed, run_kwargs, alone)
    for trainer in trainers.values():
        trainer.scorer = keep_to_score(trainer.run.history, trainer.scorer)
    all_scored = all(trainer.scorer for trainer in trainers.values())
    if trainer_kwargs["num_iterations"] and all_scored:
        rows = [summary(name, trainer) for name, trainer in trainers.items()]
        common.write(folder / f"{experiment}.csv", rows)
        for row in rows:
            print(row)
        draw_comparison(trainers, folder / f"{experiment}.png")
    return trainers


def summary(name, trainer):
    """A row {column: value} on one setting:
    its best score, and its last.
    """
    history, distance = trainer.run.history, trainer.scorer.name
    scores = [row[distance] for row in history]
    best = min(scores)
    return {
        "setting": name,
        f"best {distance}": best,
        "at iteration": history[scores.index(best)]["iteration"],
        f"last {distance}": scores[-1],
        "last diversity": history[-1]["diversity"],
    }


def draw_comparison(trainers, path):
    """Write the scores of {name: Trainer} as curves,
    and beside them the last samples of each.
    """
    from matplotlib import image
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * (1 + len(trainers)), 4.5), layout="constrained")
    curves, *pictures = figure.subplots(1, 1 + len(trainers))
    for axes, (name, trainer) in zip(pictures, trainers.items()):
        history = trainer.run.history
        iterations = [row["iteration"] for row in history]
        scores = [row[trainer.scorer.name] for row in history]
        curves.plot(iterations, scores, marker="o", markersize=3, label=name)
        axes.imshow(image.imread(trainer.folder / f"samples_{iterations[-1]}.png"))
        axes.set(title=f"{name}: {scores[-1]:.4g}", xticks=[], yticks=[])
    first = list(trainers.values())[0]
    label = f"{first.scorer.name} (N {first.scorer.num_images:,})"
    curves.set(xlabel="iteration", ylabel=label, xlim=(0, None), ylim=(0, None))
    curves.grid(alpha=0.3)
    curves.legend()
    title = f"gan_cub on {first.train.name}: {first.scorer.name}, and the last samples"
    figure.suptitle(title, fontsize=10, parse_math=False)  # a folder may have $ in its name
    common.write(path, figure)


if __name__ == "__main__":
    # the options of the command line replace values of the dicts
    common.run_script(
        main, model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment_kwargs
    )
