"""A fully connected GAN on MNIST: the smallest adversarial pair that draws digits.

paper:  Goodfellow et al. 2014, Generative Adversarial Nets, https://arxiv.org/abs/1406.2661
run:    python main_gan.py                          (any key below is an option: --num_epochs 20)
writes: mnist_GAN/: generated_image_epoch_{E}.png, train_loss_curve_{E}.png, history.csv,
        checkpoint.pt (the same command continues from it), weights_epoch_{E}.pt (for sampling)
expect: MNIST, 20 epochs, seed 0: readable digits; D(x) 0.63, D(G(z)) 0.37, diversity 0.97; 3.4 min on one core of
        an AMD EPYC
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import training

model_kwargs = {
    "latent_variable_size": 64,  # >= 1; entries of the latent vector z ~ N(0, I)
    "discriminator_hidden_size": 256,  # >= 1; width of the discriminator's two hidden layers
    "generator_hidden_size": 256,  # >= 1; width of the generator's two hidden layers
    "image_size": 784,  # >= 1; pixels of a flattened grey image, a square number: 784 is 28 x 28
}
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | cifar10 | folder | digits; all in grey; digits is the bundled sample of MNIST
    "batch_size": 16,  # >= 1; images a step
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # train on the bundled digits, with a warning, where the data cannot be had
}
trainer_kwargs = {
    "num_epochs": 200,  # >= 0; may grow later: the run continues; 0 only checks settings and data
    "generator_lr": 0.0002,  # > 0; Adam's learning rate
    "discriminator_lr": 0.0002,  # > 0; Adam's learning rate
    "real_label": 0.9,  # in [0, 1]; target for real images: below 1 keeps D from growing sure of itself
    "fake_label": 0.1,  # in [0, 1]; target for generated images
    "output_dir": "mnist_GAN",  # everything is written there
    "sample_every": 50,  # >= 1; epochs between pictures; one also after the first epoch and the last
    "seed": 0,  # in [0, 4294967295]; of weights, order and noise: on a CPU the same seed gives the same bytes
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
    "num_threads": 1,  # >= 0; CPU threads; layers this small gain little from a second; 0 is torch's own choice
    "cuda_graph": True,  # on an NVIDIA GPU each step is recorded once and replayed; false is the plain loop
    "resume": True,  # continue from output_dir/checkpoint.pt; false starts over
}


class Generator(nn.Module):
    """z (N, latent_variable_size) -> flattened image (N, image_size) in [-1, 1]."""

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
                # He et al. 2015. torch's own start is 2.4 times smaller, and from there D ran away from G on MNIST:
                # the samples' diversity fell to 0.00001 by epoch 13; from this start it was 0.92 after 4 epochs
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, z):
        return self.model(z)


class Discriminator(nn.Module):
    """Flattened image (N, image_size) -> logit (N,): its sigmoid is the probability that the image is real."""

    def __init__(self, image_size, discriminator_hidden_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(image_size, discriminator_hidden_size),
            nn.LeakyReLU(0.2),  # a slope for negative inputs too: G learns only from gradients that come through D
            nn.Linear(discriminator_hidden_size, discriminator_hidden_size),
            nn.LeakyReLU(0.2),
            nn.Linear(discriminator_hidden_size, 1),
        )

    def forward(self, x):
        return self.model(x).squeeze(1)


def discriminator_loss(real_logits, fake_logits, real_label, fake_label):
    """Cross-entropy of D, minus eq. (1) of the paper with smoothed targets; each half is a mean over the batch.

    For target t and D = sigmoid(l): -t log D - (1 - t) log(1 - D) = softplus(l) - t l. At D = 1/2 everywhere the sum
    is 2 log 2 = 1.386, whatever the targets. With 0.9 and 0.1 it cannot fall below 0.650: there D says just these.
    """
    real = F.softplus(real_logits) - real_label * real_logits
    fake = F.softplus(fake_logits) - fake_label * fake_logits
    return real.mean() + fake.mean()


def generator_loss(fake_logits):
    """Non-saturating loss, -log D(G(z)) = softplus(-l), mean over the batch (end of section 3 of the paper).

    The minimax form log(1 - D(G(z))) has a vanishing gradient exactly when G is bad and D knows it.
    """
    return F.softplus(-fake_logits).mean()


class Trainer:
    """Both networks, their optimisers, and the training loop."""

    def __init__(self, run, train, generator_lr, discriminator_lr, real_label, fake_label):
        self.run, self.train, self.labels = run, train, (real_label, fake_label)
        kwargs, device = run.model_kwargs, run.device
        self.latent_size, image_size = kwargs["latent_variable_size"], kwargs["image_size"]
        self.generator = Generator(self.latent_size, kwargs["generator_hidden_size"], image_size).to(device)
        self.discriminator = Discriminator(image_size, kwargs["discriminator_hidden_size"]).to(device)
        # beta1 of 0.5 is DCGAN's: with 0.9 the two networks swing about each other; fused is one call for all tensors
        adam = dict(betas=(0.5, 0.999), fused=True)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=generator_lr, **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=discriminator_lr, **adam)
        self.fixed_z = torch.randn(500, self.latent_size).to(device)  # every picture is drawn from these
        reals = train.batch(torch.arange(min(500, len(train)), device=device))[0]
        self.real_distance = common.mean_distance(reals)

    def step(self, real):
        """One step of D, then one of G. real (N, image_size) in [-1, 1]; returns scalars, still on the device."""
        z = torch.randn(len(real), self.latent_size, device=real.device)
        fake = self.generator(z)  # (N, image_size)

        # D sees both halves in one pass, which is safe only because it has no batch norm; detached, it teaches only D
        logits = self.discriminator(torch.cat([real, fake.detach()]))  # (2N,)
        real_logits, fake_logits = logits.chunk(2)
        d_loss = discriminator_loss(real_logits, fake_logits, *self.labels)
        self.discriminator_optimizer.zero_grad()
        d_loss.backward()
        training.average_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()

        # G is judged by the D that has just learnt; `inputs` spares the gradients of D's weights
        g_loss = generator_loss(self.discriminator(fake))
        self.generator_optimizer.zero_grad()
        g_loss.backward(inputs=list(self.generator.parameters()))
        training.average_gradients(self.generator_optimizer)
        self.generator_optimizer.step()

        d_real, d_fake = logits.detach().sigmoid().chunk(2)
        return {"discriminator loss": d_loss, "generator loss": g_loss,
                "D(x)": d_real.mean(), "D(G(z))": d_fake.mean()}

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_variable_size) -> grey images (N, 1, H, W) in [-1, 1], in eval mode."""
        self.generator.eval()
        images = self.generator(z).unflatten(1, self.train.pixels.shape[1:])
        self.generator.train()
        return images

    def fit(self):
        """Train to num_epochs, continuing from a checkpoint if there is one."""
        run = self.run
        state = {"generator": self.generator, "discriminator": self.discriminator,
                 "generator_optimizer": self.generator_optimizer,
                 "discriminator_optimizer": self.discriminator_optimizer}
        step = run.fast_step(self.step)
        for epoch in run.epochs(self.train, state):
            for images, _ in run.batches():
                run.log(step(images.flatten(1)))
            samples = self.sample(self.fixed_z)
            # 1 is as varied as the data; towards 0 the samples become all alike: mode collapse
            run.end_epoch(diversity=common.mean_distance(samples) / self.real_distance)
            if run.sampling:
                common.save_grid(samples[:16], run.folder / f"generated_image_epoch_{epoch}.png", columns=4)
                common.save_curves(run.history, {"loss (nats)": ["discriminator loss", "generator loss"],
                                                 "probability of being real": ["D(x)", "D(G(z))"],
                                                 "mean distance, real images = 1": ["diversity"]},
                                   f"main_gan on {self.train.name}", run.folder / f"train_loss_curve_{epoch}.png")
                run.save_weights(generator=self.generator)


def load_generator(weights_path):
    """Rebuild the generator of a weights_epoch_{E}.pt, in eval mode. Raises common.BadInput for any other file."""
    weights = common.load(weights_path, "main_gan", "generator")
    kwargs = weights["model_kwargs"]
    generator = Generator(kwargs["latent_variable_size"], kwargs["generator_hidden_size"], kwargs["image_size"])
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer."""
    run = training.Run(__file__, model_kwargs, dataset_kwargs, **trainer_kwargs)
    image_size = model_kwargs["image_size"]
    side = math.isqrt(image_size)
    if side**2 != image_size:
        raise common.BadInput(f"image_size {image_size} is no square number; legal: 784 (28 x 28), 1024 (32 x 32), ...")
    train, _ = datasets.load_data(**dataset_kwargs, image_size=side, channels=1, device=run.device)
    trainer = Trainer(run, train, **run.trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
