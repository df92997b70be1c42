"""A convolutional autoencoder, VAE or beta-VAE on CIFAR-10;
also on grey images such as MNIST.

paper:  Kingma and Welling 2013, Auto-Encoding Variational
        Bayes, https://arxiv.org/abs/1312.6114
        Higgins et al. 2017, beta-VAE,
        https://openreview.net/forum?id=Sy2fzU9gl
        Burgess et al. 2018, Understanding disentangling in
        beta-VAE, https://arxiv.org/abs/1804.03599
courses: CMU 16-824, Visual Learning and Recognition,
        spring 2022, assignment 3 (colour); another course's
        Exercise 1, "Training generative model to generate
        MNIST digits" (grey)
run:    python main_ae.py                   (all keys of the dicts are options)
        python main_ae.py --resume false    (start over; old run: cifar10_VAE/run_of_DATE/)
        torchrun --nproc_per_node=2 main_ae.py           (two processes, a batch each)
        python main_ae.py --experiment latent_sizes      (several settings, compared)
        python main_ae.py --dataset_type mnist --latent_dim 2 --output_dir mnist_VAE_2d
writes: cifar10_VAE/. After every epoch: history.csv, run.html
        (open it to watch: the folder's pictures, and curves),
        checkpoint.pt (also at Ctrl-C; the same command continues
        from it).
        After the first, the last and each sample_every-th:
        generated_image_epoch_{E}.png,
        reconstruction_epoch_{E}.png, train_loss_curve_{E}.png,
        latent_space_epoch_{E}.png (if latent_dim is 2),
        weights_epoch_{E}.pt (for sampling). An experiment makes
        such a folder for each setting in there, and writes
        {experiment}.png and {experiment}.csv beside them
differs from the papers: the KL is multiplied by beta, as in
        Higgins et al., while Burgess et al. pull it to a growing
        target; the networks are the courses'; gradients are
        clipped, as at CMU
differs from the courses: pictures, weights files and tests are of
        averaged networks, which are steadier; bfloat16; the grey
        networks of Exercise 1, whose sizes did not fit together,
        were made to fit 32 pixels
expect: CIFAR-10, 20 epochs, seed 0, bfloat16, squared error per
        test image: AE with 16, 128 and 1024 latents 199.6, 53.9
        and 24.1; VAE with 1024 latents 133.3, KL 59.2; with
        beta 0.8: 122.5, KL 69.7; with the linear schedule, whose
        beta ends at 0.95: 117.2, KL 72.4; about 40 min each on
        one core of an AMD EPYC. MNIST, VAE with 2 latents:
        cross-entropy 133.1 nats, KL 6.8. A KL near 0 means that
        the code is not used: all samples look alike
"""

import copy
import ctypes
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common  # data sets, pictures and weights files
import training  # the frame of a run: epochs, history, checkpoints

# A key of your own goes into trainer_kwargs and the
# parameters of Trainer.__init__. One that shapes a
# network goes into model_kwargs, the parameters of
# Trainer.__init__ and of make_networks, and the
# network.
# Checkpoints that were made without it are refused.
model_kwargs = {
    "model_type": "vae",  # ae | vae; ae has neither noise nor KL; see also beta
    "latent_dim": 1024,  # entries of the latent vector z
    "feature_maps": 32,  # channels of the first layer, doubled whenever the side is halved
    "image_channels": 3,  # 3 colour, 1 grey (both MNISTs always), with its own networks and loss
}
# Your own images: a folder of them (dataset_type
# "folder"), or from Python any torch Dataset in
# place of "cifar10": see `main`.
dataset_kwargs = {
    "dataset_type": "cifar10",  # mnist | fashion_mnist | cifar10 | cub | sprites | folder | digits
    "batch_size": 256,  # images a step, in each process
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where data are, or are downloaded to; for folder, your images
    "allow_fallback": True,  # without data: the bundled digits, with a warning
    "image_size": 32,  # pixels a side, a multiple of 8; images are resized, 28 padded to 32
}
trainer_kwargs = {
    "num_epochs": 20,  # may be raised later; 0 only checks settings and data
    "lr": 0.001,  # Adam's learning rate
    "beta": 1.0,  # weight of the KL: 0 autoencoder with noise, 1 VAE, more beta-VAE
    "beta_schedule": "constant",  # constant | linear: from 0 in epoch 1 to beta
    "beta_epochs": 20,  # of the linear schedule: with 20, epoch 21 has all of beta
    "ema_decay": 0.99,  # of the averaged weights, tested, shown and saved; 0: no average
    "precision": "auto",  # auto | float32 | bfloat16; auto: bfloat16 where it is fast
    "output_dir": "cifar10_VAE",  # everything is written there; take another for other settings
}
run_kwargs = {
    "seed": 0,  # fixes weights, order and noise; a CPU run repeats exactly, also if continued
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
    "num_threads": 0,  # CPU threads; 0 is torch's choice, all cores
    "cuda_graph": True,  # on an NVIDIA GPU replay a recorded step: faster, see `step`
    "resume": True,  # go on from checkpoint.pt; false: start over; the old run is moved aside
    "sample_every": 5,  # epochs between pictures and weights; first and last have them
}
experiment_kwargs = {
    "experiment": "none",  # none | latent_sizes | betas | schedule | model_types
}
# The settings of each experiment: keys of model_kwargs and
# trainer_kwargs. All others come from the dicts or the command
# line. If you vary other keys, add them to the folders' names in
# `compare`, or settings will share a folder.
EXPERIMENTS = {
    "latent_sizes": [
        {"model_type": "ae", "latent_dim": 16},
        {"model_type": "ae", "latent_dim": 128},
        {"model_type": "ae", "latent_dim": 1024},
    ],
    "betas": [
        {"model_type": "vae", "beta": 0.8},
        {"model_type": "vae", "beta": 1.0},
        {"model_type": "vae", "beta": 1.2},
    ],
    "schedule": [
        {"model_type": "vae", "beta_schedule": "constant"},
        {"model_type": "vae", "beta_schedule": "linear"},
    ],
    "model_types": [
        {"model_type": "ae"},
        {"model_type": "vae", "beta": 1.0},
        {"model_type": "vae", "beta": 4.0},
    ],
}


def check_settings(settings):
    """Refuse impossible values, in one line and before any work.

    settings: {key: value}. The other keys of dataset_kwargs are
    checked by common.load_data, those of run_kwargs by
    training.Run. A common.BadInput ends with exit status 2.
    """
    legal_values = {
        "model_type": ("ae", "vae"),
        "image_channels": (1, 3),
        "beta_schedule": ("constant", "linear"),
        "precision": ("auto", "float32", "bfloat16"),
        "experiment": ("none", *EXPERIMENTS),
    }
    for key, legal in legal_values.items():
        listed = ", ".join(str(value) for value in legal)
        common.require(settings[key] in legal, f"{key} must be one of {listed}")
    for key in ("latent_dim", "feature_maps", "beta_epochs"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    for key in ("num_epochs", "beta"):
        common.require(settings[key] >= 0, f"{key} must be at least 0")
    common.require(settings["lr"] > 0, "lr must be above 0")
    common.require(0 <= settings["ema_decay"] < 1, "ema_decay must be at least 0 and below 1")
    size = settings["image_size"]
    halved = "image_size must be a multiple of 8, such as 32: the encoder halves it three times"
    common.require(size >= 8 and size % 8 == 0, halved)


class ColourEncoder(nn.Module):
    """Images (N, 3, H, W) -> mu and logvar, both (N, latent_dim).

    They describe q(z|x) = N(mu, sigma^2); logvar, the logarithm of
    sigma^2, may be any number. In a plain autoencoder it is None.
    Shapes are for 32 pixels and 32 feature maps.
    """

    def __init__(self, model_type, latent_dim, feature_maps, image_size):
        super().__init__()
        width = feature_maps
        self.model = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1),  # (N, 32, 32, 32)
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),  # (N, 64, 16, 16)
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1),  # (N, 128, 8, 8)
            nn.ReLU(),
            nn.Conv2d(4 * width, 8 * width, kernel_size=3, stride=2, padding=1),  # (N, 256, 4, 4)
            # no activation, as at CMU
            nn.Flatten(),  # (N, 4096)
        )
        features = 8 * width * (image_size // 8) ** 2
        self.fc_mean = nn.Linear(features, latent_dim)
        self.fc_logvar = None
        if model_type == "vae":
            self.fc_logvar = nn.Linear(features, latent_dim)

    def forward(self, x):
        features = self.model(x)
        mu = self.fc_mean(features).float()
        if self.fc_logvar is None:
            return mu, None
        logvar = self.fc_logvar(features).float()
        return mu, logvar


class ColourDecoder(nn.Module):
    """z (N, latent_dim) -> images (N, 3, H, W).
    Shapes are for 32 pixels and 32 feature maps.
    """

    def __init__(self, latent_dim, feature_maps, image_size):
        super().__init__()
        width, side = feature_maps, image_size // 8
        self.model = nn.Sequential(
            nn.Linear(latent_dim, 4 * width * side * side),  # (N, 2048)
            nn.Unflatten(1, (4 * width, side, side)),  # (N, 128, 4, 4)
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 4 * width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),  # (N, 128, 8, 8)
            nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),  # (N, 64, 16, 16)
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),  # (N, 32, 32, 32)
            nn.Conv2d(width, 3, kernel_size=3, stride=1, padding=1),  # (N, 3, 32, 32)
        )

    def forward(self, z):
        return self.model(z).float()

    @torch.no_grad()
    def sample(self, z):
        """The images that z (N, latent_dim) stands for,
        (N, 3, H, W) in [-1, 1]: the means of p(x|z).
        """
        return self(z).clamp(-1, 1)


class GreyEncoder(nn.Module):
    """Images (N, 1, H, W) -> mu and logvar, both (N, latent_dim).

    Kernels and activations differ from the colour networks',
    since the two pairs are from two courses. In a plain
    autoencoder logvar is None.
    """

    def __init__(self, model_type, latent_dim, feature_maps, image_size):
        super().__init__()
        width = feature_maps
        self.model = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, stride=1, padding=1),  # (N, 32, 32, 32)
            nn.LeakyReLU(0.01),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),  # (N, 64, 16, 16)
            nn.LeakyReLU(0.01),
            nn.Conv2d(2 * width, 4 * width, kernel_size=4, stride=2, padding=1),  # (N, 128, 8, 8)
            nn.LeakyReLU(0.01),
            nn.Conv2d(4 * width, 8 * width, kernel_size=4, stride=2, padding=1),  # (N, 256, 4, 4)
            nn.LeakyReLU(0.01),
            nn.Flatten(),  # (N, 4096)
        )
        features = 8 * width * (image_size // 8) ** 2
        self.fc_mean = nn.Linear(features, latent_dim)
        self.fc_logvar = None
        if model_type == "vae":
            self.fc_logvar = nn.Linear(features, latent_dim)

    def forward(self, x):
        features = self.model(x)
        mu = self.fc_mean(features).float()
        if self.fc_logvar is None:
            return mu, None
        logvar = self.fc_logvar(features).float()
        return mu, logvar


class GreyDecoder(nn.Module):
    """z (N, latent_dim) -> logits (N, 1, H, W):
    their sigmoid is the probability of ink.
    """

    def __init__(self, latent_dim, feature_maps, image_size):
        super().__init__()
        width, side = feature_maps, image_size // 8
        self.model = nn.Sequential(
            nn.Linear(latent_dim, 8 * width * side * side),  # (N, 4096)
            nn.Unflatten(1, (8 * width, side, side)),  # (N, 256, 4, 4)
            nn.ConvTranspose2d(8 * width, 4 * width, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.01),  # (N, 128, 8, 8)
            nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.01),  # (N, 64, 16, 16)
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.01),  # (N, 32, 32, 32)
            nn.Conv2d(width, 1, kernel_size=3, stride=1, padding=1),  # (N, 1, 32, 32)
        )

    def forward(self, z):
        return self.model(z).float()

    @torch.no_grad()
    def sample(self, z):
        """The images that z (N, latent_dim) stands for,
        (N, 1, H, W) in [0, 1]: the means of p(x|z).
        """
        return self(z).sigmoid()


def make_networks(model_type, latent_dim, feature_maps, image_channels, image_size, device):
    """(encoder, decoder) for colour or for grey images.

    They start from torch's default random weights, as in the
    courses.
    """
    if image_channels == 3:
        encoder = ColourEncoder(model_type, latent_dim, feature_maps, image_size)
        decoder = ColourDecoder(latent_dim, feature_maps, image_size)
    else:
        encoder = GreyEncoder(model_type, latent_dim, feature_maps, image_size)
        decoder = GreyDecoder(latent_dim, feature_maps, image_size)
    # Channels last: the channels of a pixel lie side by side
    # in memory, which makes a step on a CPU 1.3 times as fast.
    encoder.to(device, memory_format=torch.channels_last)
    decoder.to(device, memory_format=torch.channels_last)
    return encoder, decoder


def keep_freed_memory():
    """On Linux, use the memory of freed tensors
    again, instead of giving it back to the system.

    It changes only the speed. By itself the C library gives
    back the memory of large tensors in each step, and asks
    for it again in the next. With this function a step took
    1.13 s instead of 1.33 s (float32, one core of an AMD
    EPYC, torch 2.14).
    """
    if sys.platform != "linux":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from the C library's malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries may have none
        libc.mallopt(M_MMAP_MAX, 0)  # no block is mapped on its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink


def reparameterize(mu, logvar):
    """z = mu + sigma * noise with noise ~ N(0, I), all (N, latent_dim).

    This is a sample of N(mu, sigma^2) through
    which gradients reach mu and sigma.
    """
    sigma = (0.5 * logvar).exp()
    return mu + sigma * torch.randn_like(mu)


def reconstruction_loss(output, x):
    """Error of the decoder's output for images x, both (N, C, H, W).

    It is summed over the pixels and averaged over the batch.
    Colour, in [-1, 1]: the squared error, which is
    -log N(x; output, 1/2 I) up to a constant. Grey, in [0, 1]:
    the cross-entropy -log p(x|z) in nats, where each pixel is the
    probability of ink and the output a logit; torch computes it
    from the logit, since the log of a sigmoid that has rounded to
    0 is infinite. Both are sums because log p of an image is the
    sum over its pixels, as the KL is a sum over latents: with a
    mean over the 3072 numbers of a colour image beta would act as
    if it were 3072 times as large.

    Another loss goes into the two returns below. For grey, take
    the output's sigmoid first, unless the loss expects logits.
    Beta then weighs against that loss. Give another --output_dir,
    since changed code is not noticed.
    """
    if x.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(output, x, reduction="sum") / len(x)
    return F.mse_loss(output, x, reduction="sum") / len(x)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)) in nats. mu, logvar: (N, latent_dim).

    It is 1/2 (mu^2 + sigma^2 - log sigma^2 - 1), summed
    over the latents, since they are independent; mean
    over the batch (Kingma and Welling, appendix B).
    """
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum() / len(mu)


class Trainer:
    """Encoder and decoder, their averages,
    the optimiser, and the training loop.

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
    - run.save_weights writes what sampling needs: the networks,
      model_kwargs, and which data they learnt from.

    At Ctrl-C the step under way is finished and
    checkpoint.pt is written; the same command goes on with
    the next step. A run that is killed loses the epoch
    under way. A loss that is no longer finite ends the run.

    Under torchrun each process has a batch, noise and,
    where there are GPUs, a GPU of its own. They share the
    images of an epoch, which has fewer steps then; the
    learning rate is not changed. All begin with equal
    networks, which stay equal: `step` averages the
    gradients over the processes. What `step` returns is
    in the history as a mean over them, what is given to
    run.end_epoch is the first one's. Only the first one
    writes files and prints. A run can be continued only
    with as many processes as it had.

    train, test: two common.Images, all of which lie on the
    device: train.pixels (M, C, H, W) are all images as uint8, and
    train.batch(index) gives those of index (N,) as floats in
    [-1, 1] (grey: in [0, 1]), and their labels.

    No layer here differs between train and eval mode.
    """

    def __init__(
        self,
        run,
        train,
        test,
        *,
        model_type,
        latent_dim,
        feature_maps,
        image_channels,
        num_epochs,
        lr,
        beta,
        beta_schedule,
        beta_epochs,
        ema_decay,
        precision,
        output_dir,
    ):
        self.run, self.train, self.test = run, train, test
        self.model_type, self.latent_dim = model_type, latent_dim
        self.num_epochs, self.folder = num_epochs, Path(output_dir)
        self.target_beta, self.ema_decay = beta, ema_decay
        self.beta_schedule, self.beta_epochs = beta_schedule, beta_epochs
        device, side = train.device, train.pixels.shape[2]
        # layers compute in bfloat16, which has three digits; with
        # .float() the networks return to float32 for the losses
        self.bfloat16 = common.use_bfloat16(precision, device)
        networks = make_networks(model_type, latent_dim, feature_maps, image_channels, side, device)
        self.encoder, self.decoder = networks
        self.ema_encoder, self.ema_decoder = copy.deepcopy(networks)
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        # Tensors, so that a recorded step (see `step`) sees a new value:
        # `fit` fills it in. In a continued run Adam still holds self.lr.
        self.lr = torch.tensor(lr, device=device)
        self.beta = torch.tensor(0.0, device=device)  # `fit` sets it before each epoch
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.lr, fused=True)
        # for all samples, so that epochs can be compared
        self.fixed_z = torch.randn(49, latent_dim).to(device)

    def losses(self, encoder, decoder, x):
        """Images x (N, C, H, W) -> {"loss", "reconstruction",
        "KL": scalar}, each a mean over the images.

        The encoder gives q(z|x), the decoder p(x|z), and the
        prior is p(z) = N(0, I). For any q
            log p(x) >= E[log p(x|z)] - KL(q(z|x) || p(z)),
        where z ~ q(z|x): the evidence lower bound (ELBO). With
        beta 1 a VAE's loss is its negative, in colour up to a
        constant; the expectation is estimated with one z. z is
        sampled for test images too, so that train and test
        losses can be compared. They still differ a little: those
        of training are means over an epoch in which the networks
        change, and are not of the averaged networks.

        For a column that needs mu or logvar add it to what is
        returned, in both places; it is then measured of the
        training images and of the test images.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            mu, logvar = encoder(x)
            z = mu if logvar is None else reparameterize(mu, logvar)
            output = decoder(z)
        reconstruction = reconstruction_loss(output, x)
        if logvar is None:  # a plain autoencoder
            no_kl = torch.zeros_like(reconstruction)
            return {"loss": reconstruction, "reconstruction": reconstruction, "KL": no_kl}
        kl = kl_divergence(mu, logvar)
        loss = reconstruction + self.beta * kl
        return {"loss": loss, "reconstruction": reconstruction, "KL": kl}

    # On an NVIDIA GPU the work of one call of `step` is recorded
    # (a CUDA graph) and then repeated, with new noise but without
    # this Python: an `if` keeps the branch that was recorded, a
    # number keeps its value, and .item() is an error. So
    # keep in a tensor what changes, as the learning rate is.
    # --cuda_graph false turns the recording off.
    def step(self, x):
        """One step of Adam, and one of the averages. x (N, C, H, W);
        returns scalars.

        For another column in history.csv add a tensor of shape ()
        to the dict that is returned, or in `losses`, where test
        images are to have it too; for a curve also to `panels`
        in draw_curves.
        """
        losses = self.losses(self.encoder, self.decoder, x)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        # torchrun: the mean over all processes; alone: nothing
        training.all_reduce_gradients(self.optimizer)
        # As at CMU, the gradient of all weights together is scaled
        # down to norm 1. The loss is a sum over pixels, and so the
        # norm is 400 to 500 before. Adam divides by the size of the
        # gradients, so its steps do not become smaller, but every
        # batch counts alike in its running mean of the gradients.
        nn.utils.clip_grad_norm_(self.parameters, max_norm=1.0)
        self.optimizer.step()
        self.update_ema()
        return losses

    @torch.no_grad()
    def update_ema(self):
        """Exponential moving average:
        ema = decay ema + (1 - decay) now, for every weight.

        The noise of single steps cancels in it. The decay
        of step t is (1 + t) / (10 + t), at most ema_decay,
        so that the first weights are soon forgotten.
        """
        # Adam's own count of steps, a tensor,
        # which grows in a recorded step too
        t = self.optimizer.state[self.parameters[0]]["step"]
        # this is 1 - decay, since 1 - (1 + t) / (10 + t) = 9 / (10 + t)
        weight = (9 / (10 + t)).clamp(min=1 - self.ema_decay)
        averages = [*self.ema_encoder.parameters(), *self.ema_decoder.parameters()]
        for ema, now in zip(averages, self.parameters):
            ema.lerp_(now, weight)

    @torch.no_grad()
    def evaluate(self):
        """The same losses as in `step`, here of
        the averaged networks and all test images.

        The loss has the epoch's beta in it: compare it between
        epochs, or between runs, only where beta is the same.
        """
        totals = {}  # {name: sum over the images}
        for x in batches_of(self.test):
            losses = self.losses(self.ema_encoder, self.ema_decoder, x)
            for name, mean in losses.items():
                totals[name] = totals.get(name, 0.0) + mean * len(x)
        return {f"test {name}": total / len(self.test) for name, total in totals.items()}

    def beta_of(self, epoch):
        """The weight of the KL in an epoch (from 1), by the schedule.

        CMU's exercise counts epochs from 0: there the linear
        schedule is 0 in epoch 0, and 0.95 beta in epoch 19 of 20.
        """
        if self.beta_schedule == "constant":
            return self.target_beta
        return self.target_beta * min(1, (epoch - 1) / self.beta_epochs)

    def fit(self):
        """Train to num_epochs.

        A checkpoint of other settings or data is refused; num_epochs,
        precision, data_dir and the run_kwargs other than the seed
        may change. Changed code is not noticed: then give another
        --output_dir, or --resume false.
        """
        run = self.run
        state = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "ema_encoder": self.ema_encoder,
            "ema_decoder": self.ema_decoder,
            "optimizer": self.optimizer,
        }
        for epoch in run.epochs(self.train, state, self.num_epochs):
            # A decay of the learning rate goes here. Compute it from
            # epoch (1, 2, ...), since a continued epoch runs this again:
            # self.lr.fill_(run.settings["lr"] * 0.9 ** (epoch - 1))
            beta = self.beta_of(epoch)
            self.beta.fill_(beta)
            for images, _ in run.batches():  # (N, C, H, W), on the device
                run.train_step(self.step, images)
                # pictures at steps 0, 100, ... go here:
                # if run.step % 100 == 0:
                #     self.draw(f"{epoch}_step_{run.step}")
            # another column, measured once an epoch, goes into this dict
            history = run.end_epoch({**self.evaluate(), "beta": beta})
            if run.pictures_due:
                self.draw(epoch)
                self.draw_curves(history, epoch)
                run.save_weights(
                    f"weights_epoch_{epoch}.pt", encoder=self.ema_encoder, decoder=self.ema_decoder
                )

    @torch.no_grad()
    def draw(self, name):
        """Write reconstructions, each to the right of its image,
        samples, and the latent space where it is a plane.
        `name` ends the names of the files.
        """
        low = -1.0 if self.test.normalize else 0.0  # the value of black
        some = torch.linspace(0, len(self.test) - 1, 36, device=self.test.device).long()
        images, _ = self.test.batch(some)  # (36, C, H, W)
        # from mu, without noise: only the networks change from epoch to epoch
        mu, _ = self.ema_encoder(images)
        rebuilt = self.ema_decoder.sample(mu)
        pairs = torch.stack([images, rebuilt], dim=1)  # (36, 2, C, H, W)
        path = self.folder / f"reconstruction_epoch_{name}.png"
        common.save_grid(pairs.flatten(0, 1), path, columns=12, low=low)
        # Of a plain autoencoder these say little: nothing
        # has taught its decoder what to make of z ~ N(0, I).
        samples = self.ema_decoder.sample(self.fixed_z)
        path = self.folder / f"generated_image_epoch_{name}.png"
        common.save_grid(samples, path, columns=7, low=low)
        if self.latent_dim == 2:
            path = self.folder / f"latent_space_epoch_{name}.png"
            draw_latent_space(self.ema_encoder, self.ema_decoder, self.test, path)

    def draw_curves(self, history, epoch):
        """Write the history so far, a list
        of rows {column: value}, as curves.
        """
        panels = {"reconstruction (per image)": ["reconstruction", "test reconstruction"]}
        if self.model_type == "vae":
            panels["KL (nats per image)"] = ["KL", "test KL"]
            panels["loss (per image)"] = ["loss", "test loss"]
        title = f"main_ae ({self.model_type}) on {self.train.name}"
        common.save_curves(history, panels, title, self.folder / f"train_loss_curve_{epoch}.png")


def batches_of(split):
    """Yield all images of a split, a common.Images, in their order:
    (batch_size, C, H, W).
    """
    for index in torch.arange(len(split), device=split.device).split(split.batch_size):
        images, _ = split.batch(index)
        yield images


@torch.no_grad()
def draw_latent_space(encoder, decoder, test, path):
    """Write a picture of a latent plane:
    the mu of every test image, coloured by its class.

    Beside it, over the same plane, is what the decoder draws there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may have $ in its name
    means = []
    for x in batches_of(test):
        mu, _ = encoder(x)
        means.append(mu)
    mu = torch.cat(means)  # (N, 2)
    # the axes end at these quantiles, so that a few outliers stay outside
    low, high = mu.quantile(torch.tensor([0.01, 0.99], device=mu.device), dim=0)  # (2,) each
    plane = decode_plane(decoder, low, high)

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for label, name in enumerate(test.class_names):
        points = mu[test.labels == label].cpu().numpy()  # (images of the class, 2)
        left.scatter(points[:, 0], points[:, 1], s=3, color=f"C{label % 10}", label=name)
    if 1 < len(test.class_names) <= 30:  # a longer legend would leave no room
        left.legend(markerscale=4, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    left.set_title(f"{len(mu):,} test images of {test.name}")
    left.set(xlabel="first latent (mu)", ylabel="second latent (mu)")
    (x_low, y_low), (x_high, y_high) = low.tolist(), high.tolist()
    extent = (x_low, x_high, y_low, y_high)
    right.imshow(plane.cpu().numpy(), extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1)
    right.set(title="what the decoder draws there", xlabel="first latent")
    common.write(path, figure)


def decode_plane(decoder, low, high, side=20):
    """side x side images of latents between low
    (2,) and high (2,), as one picture in [0, 1].

    The picture is (rows, columns, C). The first
    latent grows to the right, the second upwards.
    """
    middles = (torch.arange(side, device=low.device) + 0.5) / side  # as fractions of the axes
    first = low[0] + middles * (high[0] - low[0])
    second = low[1] + middles * (high[1] - low[1])
    # the first row of a picture is its top
    second_grid, first_grid = torch.meshgrid(second.flip(0), first, indexing="ij")
    z = torch.stack([first_grid, second_grid], dim=2).flatten(0, 1)  # (side * side, 2)
    images = decoder.sample(z)
    if images.shape[1] == 3:
        images = images / 2 + 0.5  # colour is in [-1, 1], grey in [0, 1]
    grid = images.unflatten(0, (side, side))  # (side, side, C, H, W)
    grid = grid.permute(0, 3, 1, 4, 2)  # (side, H, side, W, C)
    return grid.flatten(2, 3).flatten(0, 1)  # (side * H, side * W, C)


def load_model(weights_path):
    """(encoder, decoder) of a weights_epoch_{E}.pt.
    Raises common.BadInput for any other file.

    To sample, with 1024 latents:
        encoder, decoder = main_ae.load_model(path)
        images = decoder.sample(torch.randn(16, 1024))  # (16, 3, 32, 32)
        common.save_grid(images, "samples.png", columns=4)  # grey: low=0
    To encode: mu, logvar = encoder(images), of colour in
    [-1, 1], of grey in [0, 1].
    """
    weights = common.load_weights(weights_path, __file__, "decoder")
    side = weights["data"]["shape"][1]
    encoder, decoder = make_networks(**weights["model_kwargs"], image_size=side, device="cpu")
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights["decoder"])
    return encoder.eval(), decoder.eval()


def main(
    model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment_kwargs=experiment_kwargs
):
    """Train with the given settings;
    returns the Trainer, or {setting: Trainer} of an experiment.

    dataset_kwargs["dataset_type"] may also be a torch Dataset of
    your own with a length, here or in the dict above. It gives
    (image, label). The image is Pillow's, or a tensor (C, H, W) of
    uint8 or of floats in [0, 1]; the label is an int from 0. Every
    image is resized, not cropped, brought to the network's
    channels and kept as uint8. A tenth of the images is held
    out for testing. `dataset.classes`, if there is such a list,
    names the labels.
    """
    check_settings({**model_kwargs, **dataset_kwargs, **trainer_kwargs, **experiment_kwargs})
    if experiment_kwargs["experiment"] != "none":
        return compare(
            model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, **experiment_kwargs
        )
    if dataset_kwargs["dataset_type"] in ("mnist", "fashion_mnist"):
        model_kwargs = {**model_kwargs, "image_channels": 1}  # they are grey
    # __file__: checkpoints and weights say which script wrote them
    run = training.Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
    image_channels = model_kwargs["image_channels"]
    train, test = common.load_data(
        **dataset_kwargs,
        image_channels=image_channels,
        normalize=image_channels == 3,  # colour in [-1, 1], grey in [0, 1]
        device=run_kwargs["device"],
    )
    keep_freed_memory()
    trainer = Trainer(run, train, test, **model_kwargs, **trainer_kwargs)
    trainer.fit()
    return trainer


def with_changes(kwargs, changes):
    """A copy of kwargs with the values of
    those of its keys that `changes` holds.
    """
    return {key: changes.get(key, value) for key, value in kwargs.items()}


def compare(model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment):
    """Train each setting of an experiment in
    a folder of its own, then compare them.

    A setting whose run is complete is only read
    from its checkpoint. Returns {setting: Trainer}.
    """
    folder = Path(trainer_kwargs["output_dir"])
    trainers = {}
    for changes in EXPERIMENTS[experiment]:
        model = with_changes(model_kwargs, changes)
        trainer = with_changes(trainer_kwargs, changes)
        setting = f"{model['model_type'].upper()} latent {model['latent_dim']}"
        if model["model_type"] == "vae":
            setting = f"{setting} beta {trainer['beta']:g} {trainer['beta_schedule']}"
        print(f"{experiment}: {setting}", flush=True)
        trainer["output_dir"] = str(folder / setting.replace(" ", "_"))
        alone = {"experiment": "none"}
        trainers[setting] = main(model, dataset_kwargs, trainer, run_kwargs, alone)
    num_epochs = trainer_kwargs["num_epochs"]
    if num_epochs:
        save_table(trainers, num_epochs, folder / f"{experiment}.csv")
        draw_comparison(trainers, num_epochs, experiment, folder / f"{experiment}.png")
    return trainers


def save_table(trainers, num_epochs, path):
    """Print and write what {setting: Trainer}
    had reached after num_epochs.
    """
    rows = []
    for setting, trainer in trainers.items():
        last = trainer.run.history[num_epochs - 1]  # the run may have gone further
        row = {"setting": setting}
        for column in ("epoch", "reconstruction", "test reconstruction", "test KL", "test loss"):
            row[column] = last[column]
        rows.append(row)
        print(row, flush=True)
    common.write(path, rows)


def draw_comparison(trainers, num_epochs, experiment, path):
    """Write the test errors of
    {setting: Trainer}, epoch by epoch, as curves.
    """
    history = []
    for epoch in range(1, num_epochs + 1):
        row = {"epoch": epoch}
        for setting, trainer in trainers.items():
            measured = trainer.run.history[epoch - 1]
            row[f"{setting}: reconstruction"] = measured["test reconstruction"]
            row[f"{setting}: KL"] = measured["test KL"]
        history.append(row)
    vaes = [setting for setting, trainer in trainers.items() if trainer.model_type == "vae"]
    others = [setting for setting in trainers if setting not in vaes]
    # VAEs first, so that each has one colour in both panels
    panels = {"test reconstruction": [f"{setting}: reconstruction" for setting in vaes + others]}
    if vaes:
        panels["test KL"] = [f"{setting}: KL" for setting in vaes]
    data = list(trainers.values())[0].train.name
    common.save_curves(history, panels, f"{experiment} on {data}", path)


if __name__ == "__main__":
    # the options of the command line replace values of the dicts
    common.run_script(
        main, model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs, experiment_kwargs
    )
