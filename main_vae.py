"""A fully connected variational autoencoder (VAE) on MNIST:
each pixel is the toss of a coin, ink or none.

paper:  Kingma and Welling 2013, Auto-Encoding Variational
        Bayes, https://arxiv.org/abs/1312.6114
        Burda et al. 2015, Importance Weighted Autoencoders,
        https://arxiv.org/abs/1509.00519
        (the bound that is measured at the end)
run:    python main_vae.py                  (all keys of the dicts are options)
        torchrun --nproc_per_node=2 main_vae.py   (two processes, a batch each)
writes: mnist_VAE/. After every epoch: history.csv, run.html
        (open it to watch: the folder's pictures, and curves),
        checkpoint.pt (also at Ctrl-C; the same command continues
        from it).
        After the first, the last and each sample_every-th:
        generated_image_epoch_{E}.png,
        reconstruction_epoch_{E}.png, train_loss_curve_{E}.png,
        weights_epoch_{E}.pt (for sampling)
differs from the paper: two hidden layers of 1024
        ReLU (there: one of 500, tanh), Adam with a
        rate that halves (there: Adagrad), He weights
expect: MNIST, 50 epochs, seed 0, bfloat16: test loss
        96.9 nats per image (below 100 from epoch 15 on), KL
        24.3, log p(x) >= -93.4 with 50 samples; 16 min on
        one core of an AMD EPYC
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
# Trainer.__init__, and both networks, since
# load_model gives them all of model_kwargs.
# Checkpoints that were made without it are refused.
model_kwargs = {
    "hidden_size": 1024,  # width of the two hidden layers of encoder and decoder
    "latent_dim": 32,  # entries of z; after 50 epochs 23 of 32 are in use
    "image_size": 784,  # pixels of a flattened grey image: 784 is 28 x 28
}
# Your own images: a folder of them (dataset_type
# "folder"), or from Python any torch Dataset in
# place of "mnist": see `main`.
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | fashion_mnist | cifar10 | cub | sprites | folder | digits
    "batch_size": 128,  # images a step, in each process; small ones are slow
    "shuffle": True,  # a new order every epoch
    "normalize": False,  # must stay so: the likelihood needs pixels in [0, 1]
    "data_dir": "data",  # where data are, or are downloaded to; for folder, your images
    "allow_fallback": True,  # without data: the bundled digits, with a warning
    "exclude_class": -1,  # a label to leave out (detect_vae_anomalies.py); -1: none
}
trainer_kwargs = {
    "num_epochs": 50,  # may be raised later; 0 only checks settings and data
    "lr": 0.001,  # Adam's learning rate in the first epoch
    "lr_half_life": 10.0,  # the rate halves every so many epochs; 0: it stays
    "precision": "auto",  # auto | float32 | bfloat16; auto: bfloat16 where it is fast
    "iwae_samples": 50,  # samples per image of the final bound; 0 leaves it out
    "output_dir": "mnist_VAE",  # everything is written there
}
run_kwargs = {
    "seed": 0,  # fixes weights, order and noise; a CPU run repeats exactly, also if continued
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
    "num_threads": 0,  # CPU threads; 0: torch's choice, all cores
    "cuda_graph": True,  # on an NVIDIA GPU replay a recorded step: faster, see `step`
    "resume": True,  # go on from checkpoint.pt; false: start over; the old run is moved aside
    "sample_every": 10,  # epochs between pictures and weights; first and last have them
}


def check_settings(settings):
    """Refuse impossible values, in one line and before any work.

    settings: {key: value}. The other keys of dataset_kwargs are
    checked by common.load_data, those of run_kwargs by
    training.Run. A common.BadInput ends with exit status 2.
    """
    for key in ("hidden_size", "latent_dim"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    side = math.isqrt(max(0, settings["image_size"]))
    squares = "a square number such as 784 (28 x 28) or 1024 (32 x 32)"
    common.require(settings["image_size"] == side**2 > 0, f"image_size must be {squares}")
    in_range = "normalize must be false: a coin has no likelihood for pixels in [-1, 1]"
    common.require(not settings["normalize"], in_range)
    common.require(settings["lr"] > 0, "lr must be above 0")
    for key in ("num_epochs", "lr_half_life", "iwae_samples"):
        common.require(settings[key] >= 0, f"{key} must be at least 0")
    legal = ("auto", "float32", "bfloat16")
    common.require(settings["precision"] in legal, f"precision must be one of {', '.join(legal)}")


class Encoder(nn.Module):
    """Images in [0, 1] -> mu and logvar of
    q(z|x) = N(mu, sigma^2), both (N, latent_dim).

    The images are (N, image_size) or (N, 1, H, W).
    """

    def __init__(self, hidden_size, latent_dim, image_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(image_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
        )
        self.fc_mean = nn.Linear(hidden_size, latent_dim)
        # log sigma^2 may be any real number, and sigma stays above 0
        self.fc_logvar = nn.Linear(hidden_size, latent_dim)
        self.apply(init_weights)

    def forward(self, x):
        features = self.model(x.flatten(1))  # (N, hidden_size)
        mu = self.fc_mean(features)  # (N, latent_dim)
        logvar = self.fc_logvar(features)  # (N, latent_dim)
        return mu.float(), logvar.float()


class Decoder(nn.Module):
    """z (N, latent_dim) -> logits (N, image_size):
    their sigmoid is the probability of ink.
    """

    def __init__(self, hidden_size, latent_dim, image_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_dim, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, image_size),
        )
        self.apply(init_weights)

    def forward(self, z):
        return self.model(z).float()

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_dim) -> flattened
        images (N, image_size) in [0, 1].

        A pixel is the probability of its coin, not a toss of it.
        """
        return self(z).sigmoid()


def init_weights(module):
    """Weights of standard deviation sqrt(2 / inputs), He et al. 2015.

    With them a signal keeps its size from one ReLU layer to the
    next. torch's own are sqrt(6) = 2.4 times smaller.
    """
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def reparameterize(mu, logvar):
    """z = mu + sigma * noise with noise ~ N(0, I), all (N, latent_dim).

    This is a sample of N(mu, sigma^2) through
    which gradients reach mu and sigma.
    """
    sigma = (0.5 * logvar).exp()
    return mu + sigma * torch.randn_like(mu)


def reconstruction_loss(logits, x):
    """-log p(x|z) in nats, where each pixel is a coin (Bernoulli).
    logits, x: (N, image_size).

    With p the sigmoid of the logit it is
    -x log p - (1 - x) log(1 - p), summed over the pixels, mean
    over the batch. It is a sum because log p of an image is the
    sum over its pixels, as the KL is one over latents: a mean
    over pixels would weigh the KL 784 times too much. Grey
    pixels count as the probability of ink, so these nats do not
    compare with those that are published for binarised MNIST.

    Another loss goes here and into bound_on_log_likelihood; the
    sigmoid is in the decoder's `sample`. Then give another
    --output_dir.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)) in nats. mu, logvar: (N, latent_dim).

    It is 1/2 (mu^2 + sigma^2 - log sigma^2 - 1), summed over the
    latents, mean over the batch (Kingma and Welling, appendix B).
    """
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum() / len(mu)


def importance_weighted_bound(mu, logvar, log_likelihood, k):
    """A lower bound on log p(x) in nats, (N,):
    eq. (8) of Burda et al. with k samples.

    The bound is the expectation of
    log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x), where the z_i are
    drawn from q(z|x) = N(mu, sigma^2); what is returned is an
    estimate of it from k samples. mu, logvar: (N, latent_dim);
    log_likelihood(z) gives log p(x|z), (N,). With k = 1 it is
    the VAE's own bound, the negative loss; as k grows, it rises
    towards log p(x).
    """
    log_weights = []
    for _ in range(k):
        noise = torch.randn_like(mu)
        z = mu + (0.5 * logvar).exp() * noise
        # log p(z) - log q(z|x); the factors of 2 pi cancel
        log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(1)  # (N,)
        log_weights.append(log_likelihood(z) + log_ratio)
    return torch.stack(log_weights).logsumexp(0) - math.log(k)


class Trainer:
    """Encoder, decoder, their optimiser, and the training loop.

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

    train, test: two common.Images, which lie on the device as
    a whole: train.pixels (M, 1, H, W) are all images as uint8,
    and train.batch(index) gives those of index (N,) as floats
    in [0, 1], and their labels.
    """

    def __init__(
        self,
        run,
        train,
        test,
        *,
        hidden_size,
        latent_dim,
        image_size,
        num_epochs,
        lr,
        lr_half_life,
        precision,
        iwae_samples,
        output_dir,
    ):
        self.run, self.train, self.test = run, train, test
        self.num_epochs, self.folder = num_epochs, Path(output_dir)
        self.first_lr, self.lr_half_life = lr, lr_half_life
        self.iwae_samples = iwae_samples
        device = train.device
        # only the networks compute in bfloat16;
        # their weights and the losses are float32
        self.bfloat16 = common.use_bfloat16(precision, device)
        self.encoder = Encoder(hidden_size, latent_dim, image_size).to(device)
        self.decoder = Decoder(hidden_size, latent_dim, image_size).to(device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        # A tensor, not a number (see `step`): `fit` changes it with
        # fill_, and the optimiser holds this very tensor, also in a
        # continued run. `fused` updates all weights in one call.
        self.lr = torch.tensor(lr, device=device)
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr, fused=True)
        # every picture is drawn from the same latent vectors and
        # the same test images, so that epochs can be compared
        self.fixed_z = torch.randn(100, latent_dim).to(device)
        some = torch.linspace(0, len(test) - 1, 50, device=device).long()
        self.fixed_images = test.batch(some)[0]  # (50, 1, H, W)

    def losses(self, x):
        """Images x (N, image_size) -> {"loss", "reconstruction",
        "KL": scalar}, in nats per image.

        The encoder gives q(z|x), the decoder p(x|z), and the
        prior is p(z) = N(0, I). For any q
            log p(x) >= E[log p(x|z)] - KL(q(z|x) || p(z)),
        where z ~ q(z|x) (Kingma and Welling, eq. 3). The right
        side is the evidence lower bound (ELBO), and the loss is
        its negative; the expectation is estimated with one z.
        Natural logarithms make the unit nats. z is sampled for
        test images too, so that train and test losses can be
        compared. For a column that needs mu or logvar add it to
        what is returned; it is then measured of the training
        images and of the test images.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            mu, logvar = self.encoder(x)
            z = reparameterize(mu, logvar)
            logits = self.decoder(z)
        reconstruction = reconstruction_loss(logits, x)
        kl = kl_divergence(mu, logvar)
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "KL": kl}

    # On an NVIDIA GPU the work of one call of `step` is recorded
    # (a CUDA graph) and then repeated, with new noise but without
    # this Python: an `if` keeps the branch that was recorded, a
    # number keeps its value, and .item() is an error. So
    # keep in a tensor what changes, as the learning rate is.
    # --cuda_graph false turns the recording off.
    def step(self, x):
        """One step of Adam. x (N, image_size) in [0, 1]; returns scalars.

        For another column in history.csv add a tensor of shape ()
        to the dict that is returned, or in `losses`, where test
        images are to have it too; for a curve also to `panels`
        in draw_curves.
        """
        losses = self.losses(x)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        # torchrun: the mean over all processes; alone: nothing
        training.all_reduce_gradients(self.optimizer)
        self.optimizer.step()
        return losses

    def test_batches(self):
        """Yield the test images, 500 at a time:
        (500, image_size) in [0, 1].
        """
        for index in torch.arange(len(self.test), device=self.test.device).split(500):
            images, _ = self.test.batch(index)
            yield images.flatten(1)

    @torch.no_grad()
    def evaluate(self):
        """The losses of training, on the test
        images, and the number of active latents.

        Under torchrun every process computes all of them.
        A latent is active if the variance of its mu over the
        images is above 0.01 (Burda et al., section 5.2).
        """
        totals = {}  # {name: sum over the images}
        means = []
        for x in self.test_batches():
            for name, mean in self.losses(x).items():
                totals[name] = totals.get(name, 0.0) + mean * len(x)
            mu, _ = self.encoder(x)
            means.append(mu)
        measured = {f"test {name}": total / len(self.test) for name, total in totals.items()}
        variance = torch.cat(means).var(0)  # (latent_dim,)
        measured["active latents"] = (variance > 0.01).sum()
        return measured

    def bound_on_log_likelihood(self, x):
        """The importance-weighted bound on log p(x)
        for images x (N, image_size), in nats: (N,).
        """

        def log_likelihood(z):
            logits = self.decoder(z)
            error = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
            return -error.sum(1)  # (N,)

        mu, logvar = self.encoder(x)
        return importance_weighted_bound(mu, logvar, log_likelihood, self.iwae_samples)

    @torch.no_grad()
    def estimate_log_likelihood(self):
        """The mean of that bound over the test images.

        It leaves the random numbers as they were:
        a run that is continued with more epochs
        ends as if it had not stopped here.
        """
        device = self.test.device
        gpus = [device] if device.type == "cuda" else []
        total = 0.0
        with torch.random.fork_rng(gpus):
            for x in self.test_batches():
                total += self.bound_on_log_likelihood(x).sum().item()
        return total / len(self.test)

    def fit(self):
        """Train to num_epochs.

        A checkpoint of other settings or data is refused; num_epochs,
        precision, data_dir and the run_kwargs other than the seed
        may change. Changed code is not noticed: then give another
        --output_dir, or --resume false.
        """
        run = self.run
        state = {"encoder": self.encoder, "decoder": self.decoder, "optimizer": self.optimizer}
        for epoch in run.epochs(self.train, state, self.num_epochs):
            # another schedule goes here, computed from epoch (1, 2, ...)
            if self.lr_half_life:
                self.lr.fill_(self.first_lr * 0.5 ** ((epoch - 1) / self.lr_half_life))
            for images, _ in run.batches():  # (N, 1, H, W) in [0, 1], on the device
                run.train_step(self.step, images.flatten(1))
                # pictures at steps 0, 100, ... go here:
                # if run.step % 100 == 0:
                #     self.draw(f"{epoch}_step_{run.step}")
            # another column, measured once an epoch, goes into this dict
            measured = self.evaluate()
            if epoch == self.num_epochs and self.iwae_samples:
                bound = self.estimate_log_likelihood()
                measured["bound on log p(x)"] = bound
                name = f"importance-weighted bound with {self.iwae_samples} samples"
                print(f"{name}: log p(x) >= {bound:.3f} nats per test image", flush=True)
            history = run.end_epoch(measured)
            if run.pictures_due:
                self.draw(epoch)
                self.draw_curves(history, epoch)
                run.save_weights(
                    f"weights_epoch_{epoch}.pt", encoder=self.encoder, decoder=self.decoder
                )

    def draw(self, name):
        """Write a hundred samples as one picture,
        and fifty reconstructions as another.
        """
        samples = self.decoder.sample(self.fixed_z).unflatten(1, self.train.pixels.shape[1:])
        path = self.folder / f"generated_image_epoch_{name}.png"
        common.save_grid(samples, path, columns=10, low=0.0)
        rows = self.reconstruct(self.fixed_images)
        path = self.folder / f"reconstruction_epoch_{name}.png"
        common.save_grid(rows, path, columns=10, low=0.0)

    @torch.no_grad()
    def reconstruct(self, images):
        """(10 n, C, H, W) -> (20 n, C, H, W):
        ten originals, then their reconstructions, ...
        """
        # from mu: with a sampled z each picture would vary a little
        mu, _ = self.encoder(images)
        rebuilt = self.decoder.sample(mu).view_as(images)
        original_rows = images.unflatten(0, (-1, 10))  # (n, 10, C, H, W)
        rebuilt_rows = rebuilt.unflatten(0, (-1, 10))  # (n, 10, C, H, W)
        return torch.stack([original_rows, rebuilt_rows], dim=1).flatten(0, 2)

    def draw_curves(self, history, epoch):
        """Write the history so far, a list
        of rows {column: value}, as curves.
        """
        panels = {
            "loss (nats per image)": ["loss", "test loss"],
            "reconstruction (nats per image)": ["reconstruction", "test reconstruction"],
            "KL (nats per image)": ["KL", "test KL"],
        }
        title = f"main_vae on {self.train.name}"
        common.save_curves(history, panels, title, self.folder / f"train_loss_curve_{epoch}.png")


def load_model(weights_path):
    """(encoder, decoder) of a weights_epoch_{E}.pt.
    Raises common.BadInput for any other file.

    To sample: decoder.sample(torch.randn(16, 32)) gives (16, 784)
    in [0, 1]. To encode: mu, logvar = encoder(images), of (N, 784).
    """
    weights = common.load_weights(weights_path, __file__, "decoder")
    encoder = Encoder(**weights["model_kwargs"])
    decoder = Decoder(**weights["model_kwargs"])
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights["decoder"])
    return encoder.eval(), decoder.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs):
    """Train with the given settings; returns the Trainer.

    dataset_kwargs["dataset_type"] may also be a torch Dataset of
    your own with a length, here or in the dict above. It gives
    (image, label). The image is Pillow's, or a tensor (C, H, W) of
    uint8 or of floats in [0, 1]; the label is an int from 0. Every
    image is resized, not cropped, brought to the network's
    channels and kept as uint8. A tenth of the images is held
    out for testing. `dataset.classes`, if there is such a list,
    names the labels.
    """
    check_settings({**model_kwargs, **dataset_kwargs, **trainer_kwargs})
    # __file__: checkpoints and weights say which script wrote them
    run = training.Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
    train, test = common.load_data(
        **dataset_kwargs,
        image_size=math.isqrt(model_kwargs["image_size"]),
        image_channels=1,
        device=run_kwargs["device"],
    )
    trainer = Trainer(run, train, test, **model_kwargs, **trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    # the options of the command line replace values of the dicts
    common.run_script(main, model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs)
