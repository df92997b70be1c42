"""A fully connected variational autoencoder (VAE) on MNIST; a pixel is a Bernoulli variable: ink or none.

paper:  Kingma and Welling 2013, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114
        Burda et al. 2015, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519 (the bound at the end)
run:    python main_vae.py                          (any key below is an option: --num_epochs 20)
writes: mnist_VAE/: generated_image_epoch_{E}.png, reconstruction_epoch_{E}.png, train_loss_curve_{E}.png,
        history.csv, log_likelihood.csv, checkpoint.pt (the same command continues from it),
        weights_epoch_{E}.pt (for sampling)
expect: test loss 96.9 nats per image after 50 epochs of MNIST (below 100 from the 15th), KL 24.3, log p(x) >= -93.4
        with k = 50; bfloat16, --num_threads 1, seed 0: 16 min on one shared core of an AMD EPYC, torch 2.15
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import training

model_kwargs = {
    "hidden_size": 1024,  # >= 1; width of the two hidden layers of encoder and decoder
    "latent_dim": 32,  # >= 1; entries of z; 23 are in use after 50 epochs, the others only add noise to the decoder
    "image_size": 784,  # >= 1; pixels of a flattened grey image, a square number: 784 is 28 x 28
}
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | cifar10 | folder | digits; all in grey; digits is the bundled sample of MNIST
    "batch_size": 128,  # >= 1; images a step; Adam rewrites every weight once a step, which makes 16 slow
    "shuffle": True,  # a new order every epoch
    "normalize": False,  # pixels in [0, 1], as the likelihood needs them; true ([-1, 1]) is refused
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # train on the bundled digits, with a warning, where the data cannot be had
    "exclude_class": -1,  # >= -1; a label that is left out, for detect_vae_anomalies.py to find; -1 keeps all
}
trainer_kwargs = {
    "num_epochs": 50,  # >= 0; may grow later: the run continues; 0 only checks settings and data
    "lr": 0.001,  # > 0; Adam's learning rate in the first epoch
    "lr_half_life": 10.0,  # >= 0; epochs in which the learning rate halves; 0 keeps it constant
    "precision": "auto",  # auto | float32 | tf32 | bfloat16; of the networks' arithmetic; auto: bfloat16 if fast
    "iwae_samples": 50,  # >= 0; k of the importance-weighted bound on the test split after training; 0 leaves it out
    "output_dir": "mnist_VAE",  # everything is written there
    "sample_every": 10,  # >= 1; epochs between pictures; one also after the first epoch and the last
    "seed": 0,  # in [0, 4294967295]; of weights, order and noise: on a CPU the same seed gives the same bytes
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
    "num_threads": 0,  # >= 0; CPU threads; 0 is torch's own choice, all cores
    "cuda_graph": True,  # on an NVIDIA GPU each step is recorded once and replayed; false is the plain loop
    "resume": True,  # continue from output_dir/checkpoint.pt; false starts over
}


class Encoder(nn.Module):
    """Images in [0, 1], flat or (N, 1, H, W) -> mu and logvar of q(z|x) = N(mu, sigma^2), both (N, latent_dim)."""

    def __init__(self, hidden_size, latent_dim, image_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(image_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
        )
        self.fc_mean = nn.Linear(hidden_size, latent_dim)
        self.fc_logvar = nn.Linear(hidden_size, latent_dim)  # log sigma^2: any real number is legal, sigma stays > 0
        self.apply(init_weights)

    def forward(self, x):
        features = self.model(x.flatten(1))
        return self.fc_mean(features).float(), self.fc_logvar(features).float()


class Decoder(nn.Module):
    """z (N, latent_dim) -> logits of the pixels (N, image_size): their sigmoid is the probability of ink."""

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
        """z (N, latent_dim) -> flattened images (N, image_size) in [0, 1]: the coins' probabilities, not tosses."""
        return self(z).sigmoid()


def init_weights(module):
    """He et al. 2015: no layer shrinks its input, as torch's own start (2.4 times smaller) does."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def reparameterize(mu, logvar):
    """z = mu + sigma noise, noise ~ N(0, I): a sample of N(mu, sigma^2) through which gradients reach mu and sigma."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def reconstruction_loss(logits, x):
    """-log p(x|z) of one coin (Bernoulli) a pixel, in nats: summed over pixels, mean over the batch; both (N, pixels).

    -x log p - (1 - x) log(1 - p) with p = sigmoid(l) is softplus(l) - x l. A sum, because log p of an image is the sum
    over its pixels, as the KL is one over latents: a mean over pixels would weigh the KL 784 times too much. Grey
    pixels count as the probability of ink, so these nats do not compare with those of binarised MNIST.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)) = 1/2 sum(mu^2 + sigma^2 - log sigma^2 - 1), in nats, mean over the batch.

    Kingma and Welling, appendix B; summed over latents; both (N, latent_dim).
    """
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum() / len(mu)


def importance_weighted_bound(mu, logvar, log_likelihood, k):
    """log p(x) >= E log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x), z_i ~ q(z|x) = N(mu, sigma^2): eq. (8) of Burda et al.

    mu, logvar (N, D); log_likelihood(z) gives log p(x|z), (N,). Returns (N,) in nats, one draw of what E averages; its
    mean is the bound. k = 1 is the VAE's own; it grows with k towards log p(x).
    """
    weights = []
    for _ in range(k):
        noise = torch.randn_like(mu)
        z = mu + (0.5 * logvar).exp() * noise
        # log p(z) - log q(z|x); the 2 pi cancel
        log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(1)
        weights.append(log_likelihood(z) + log_ratio)
    return torch.stack(weights).logsumexp(0) - math.log(k)


class Trainer:
    """Encoder, decoder, optimiser, and the training loop."""

    def __init__(self, run, train, test, lr, lr_half_life, precision, iwae_samples):
        self.run, self.train, self.test = run, train, test
        self.bfloat16 = common.set_precision(precision, run.device)  # weights and losses are float32 all the same
        self.lr, self.half_life, self.iwae_samples = lr, lr_half_life or float("inf"), iwae_samples
        self.encoder = Encoder(**run.model_kwargs).to(run.device)
        self.decoder = Decoder(**run.model_kwargs).to(run.device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        # fused is one call for all tensors; a learning rate on the device, so that a captured step can change it
        self.lr_now = torch.tensor(lr, device=run.device)
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr_now, fused=True)
        # every picture is drawn from these latents and these test images
        self.fixed_z = torch.randn(100, run.model_kwargs["latent_dim"]).to(run.device)
        self.fixed_images = test.batch(torch.linspace(0, len(test) - 1, 50, device=run.device).long())[0]

    def losses(self, x):
        """Images x (N, image_size) -> loss, reconstruction, KL in nats per image; z is sampled, also in validation."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            mu, logvar = self.encoder(x)
            logits = self.decoder(reparameterize(mu, logvar))
        reconstruction, kl = reconstruction_loss(logits, x), kl_divergence(mu, logvar)
        return reconstruction + kl, reconstruction, kl

    def step(self, x):
        """One step of Adam on images x (N, image_size) in [0, 1]; returns scalars, still on the device."""
        loss, reconstruction, kl = self.losses(x)
        self.optimizer.zero_grad()
        loss.backward()
        training.average_gradients(self.optimizer)
        self.optimizer.step()
        return {"loss": loss, "reconstruction": reconstruction, "KL": kl}

    def test_batches(self):
        """The test split, flattened: (N, image_size) at a time."""
        for index in torch.arange(len(self.test), device=self.run.device).split(500):
            yield self.test.batch(index)[0].flatten(1)

    @torch.no_grad()
    def evaluate(self):
        """Loss, reconstruction and KL of the test split, by the formulas of training, and the number of active latents.

        A latent is active if its mu varies over the images with a variance above 0.01 (Burda et al., section 5.2).
        """
        total = sum(torch.stack(self.losses(x)) * len(x) for x in self.test_batches()) / len(self.test)
        mu = torch.cat([self.encoder(x)[0] for x in self.test_batches()])
        return dict(zip(["test_loss", "test_reconstruction", "test_KL"], total.tolist()),
                    active_latents=(mu.var(0) > 0.01).sum().item())

    @torch.no_grad()
    def estimate_log_likelihood(self, k):
        """The importance-weighted bound on log p(x), in nats, mean over the test split."""
        total = 0
        for x in self.test_batches():
            bound = importance_weighted_bound(*self.encoder(x), lambda z: -F.binary_cross_entropy_with_logits(
                self.decoder(z), x, reduction="none").sum(1), k)
            total += bound.sum()
        return total.item() / len(self.test)

    def fit(self):
        """Train to num_epochs, continuing from a checkpoint if there is one."""
        run, shape = self.run, self.train.pixels.shape[1:]
        state = {"encoder": self.encoder, "decoder": self.decoder, "optimizer": self.optimizer}
        step = run.fast_step(self.step)
        for epoch in run.epochs(self.train, state):
            self.optimizer.param_groups[0]["lr"] = self.lr_now.fill_(self.lr * 0.5 ** ((epoch - 1) / self.half_life))
            for images, _ in run.batches():
                run.log(step(images.flatten(1)))
            run.end_epoch(**self.evaluate())
            if run.sampling:
                samples = self.decoder.sample(self.fixed_z).unflatten(1, shape)
                common.save_grid(samples, run.folder / f"generated_image_epoch_{epoch}.png", columns=10, low=0)
                common.save_grid(self.reconstruct(self.fixed_images),
                                 run.folder / f"reconstruction_epoch_{epoch}.png", columns=10, low=0)
                common.save_curves(run.history, {"loss (nats per image)": ["loss", "test loss"],
                                                 "reconstruction (nats per image)":
                                                 ["reconstruction", "test reconstruction"],
                                                 "KL (nats per image)": ["KL", "test KL"]},
                                   f"main_vae on {self.train.name}", run.folder / f"train_loss_curve_{epoch}.png")
                run.save_weights(encoder=self.encoder, decoder=self.decoder)
        if self.iwae_samples and run.epoch:
            bound = self.estimate_log_likelihood(self.iwae_samples)
            print(f"importance-weighted bound, k = {self.iwae_samples}: log p(x) >= {bound:.3f} nats per test image")
            common.write(run.folder / "log_likelihood.csv", f"epoch,k,bound on log p(x) (nats per test image)\n"
                         f"{run.epoch},{self.iwae_samples},{bound:.6g}\n".encode())

    def reconstruct(self, images):
        """images (10 n, C, H, W) -> (20 n, C, H, W): ten originals, then their reconstructions, then the next ten."""
        # from mu, the best guess: noise would only blur the picture
        rebuilt = self.decoder.sample(self.encoder(images.flatten(1))[0]).view_as(images)
        return torch.stack([images.unflatten(0, (-1, 10)), rebuilt.unflatten(0, (-1, 10))], dim=1).flatten(0, 2)


def load_model(weights_path):
    """(encoder, decoder) of a weights_epoch_{E}.pt, in eval mode. Raises common.BadInput for any other file."""
    weights = common.load(weights_path, "main_vae", "decoder")
    encoder, decoder = Encoder(**weights["model_kwargs"]), Decoder(**weights["model_kwargs"])
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights["decoder"])
    return encoder.eval(), decoder.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer."""
    run = training.Run(__file__, model_kwargs, dataset_kwargs, **trainer_kwargs)
    image_size = model_kwargs["image_size"]
    side = math.isqrt(image_size)
    if side**2 != image_size:
        raise common.BadInput(f"image_size {image_size} is no square number; legal: 784 (28 x 28), 1024 (32 x 32), ...")
    if dataset_kwargs["normalize"]:
        raise common.BadInput("normalize true puts pixels into [-1, 1], where a coin has no likelihood; legal: false")
    excluded = (dataset_kwargs := dict(dataset_kwargs)).pop("exclude_class")
    train, test = datasets.load_data(**dataset_kwargs, image_size=side, channels=1, device=run.device)
    if excluded >= 0:
        train.leave_out(excluded)
        test.leave_out(excluded)
    trainer = Trainer(run, train, test, **run.trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
