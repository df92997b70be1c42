"""A deep convolutional GAN (DCGAN) on CIFAR-10; also on MNIST, or your own images, at 16, 28, 32 or 64 pixels.

paper:  Radford et al. 2015, Unsupervised Representation Learning with DCGANs, https://arxiv.org/abs/1511.06434
run:    python main_dcgan.py                        (--dataset_type mnist for digits; any key below is an option)
writes: cifar10_GAN/: generated_image_epoch_{E}.png, train_loss_curve_{E}.png, history.csv,
        checkpoint.pt (the same command continues from it), weights_epoch_{E}.pt (for sampling)
expect: CIFAR-10, 10 epochs, seed 0: shapes of cars, birds, ships; D(x) 0.75, D(G(z)) 0.25, diversity 0.98; 43 min
        of one AMD EPYC core
"""
import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import fid
import training

model_kwargs = {
    "latent_dim": 100,  # >= 1; entries of the latent vector z ~ N(0, I)
    "feature_maps": 64,  # >= 1; channels next to the image; they double with every halving of its side
    "image_channels": 3,  # 1 | 3; grey or colour; mnist is grey whatever stands here
}
dataset_kwargs = {
    "dataset_type": "cifar10",  # mnist | cifar10 | sprites | folder | digits; digits: the bundled sample of MNIST
    "batch_size": 16,  # >= 1; images a step
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # train on the bundled digits, with a warning, where the data cannot be had
    "image_size": 0,  # 0 | 16 | 28 | 32 | 64; pixels a side; 0 is the data set's own (sprites: 16, folder: 32)
    "horizontal_flip": False,  # mirror every other training image at random: for objects, not for digits
}
trainer_kwargs = {
    "num_epochs": 200,  # >= 0; may grow later: the run continues; 0 only checks settings and data
    "generator_lr": 0.0002,  # > 0; Adam's learning rate, the paper's
    "discriminator_lr": 0.0002,  # > 0; Adam's learning rate, the paper's
    "ema_decay": 0.999,  # in [0, 1); pictures and weights show G averaged over about 1000 steps; 0 is G itself
    "output_dir": "cifar10_GAN",  # everything is written there
    "score_every": 0,  # >= 0; epochs between Frechet distances of 10,000 samples to the training images; 0 is never
    "score_features": "classifier",  # inception | classifier; see fid.py: only with inception is it the FID
    "sample_every": 50,  # >= 1; epochs between pictures; one also after the first epoch and the last
    "seed": 0,  # in [0, 4294967295]; of weights, order and noise: on a CPU the same seed gives the same bytes
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
    "num_threads": 0,  # >= 0; CPU threads; 0 is torch's own choice, all cores: right for convolutions
    "cuda_graph": True,  # on an NVIDIA GPU each step is recorded once and replayed; false is the plain loop
    "resume": True,  # continue from output_dir/checkpoint.pt; false starts over
}


def sides(image_size):
    """The side of the first feature map and how often it doubles up to image_size: 28 is 7 twice doubled."""
    table = {16: (4, 2), 28: (7, 2), 32: (4, 3), 64: (4, 4)}
    if image_size not in table:
        raise common.BadInput(f"image_size is {image_size}; legal: 16, 28, 32 or 64")
    return table[image_size]


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, C, H, W) in [-1, 1]."""

    def __init__(self, latent_dim, feature_maps, image_channels, image_size):
        super().__init__()
        first, doublings = sides(image_size)
        channels = [feature_maps * 2**i for i in reversed(range(doublings))] + [image_channels]  # 256, 128, 64, 3
        layers = [nn.ConvTranspose2d(latent_dim, channels[0], kernel_size=first, stride=1, padding=0, bias=False)]
        for narrow, wide in zip(channels[1:], channels):
            # batch norm subtracts the mean, so the convolution before it needs no bias
            layers += [nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1, bias=False)]
        self.model = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)

    def forward(self, z):
        # at 32 pixels: (N, 100, 1, 1) -> (N, 256, 4, 4) -> (N, 128, 8, 8) -> (N, 64, 16, 16) -> (N, 3, 32, 32)
        return self.model(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, C, H, W) in [-1, 1] -> logit (N,): its sigmoid is the probability that the image is real."""

    def __init__(self, feature_maps, image_channels, image_size):
        super().__init__()
        last, halvings = sides(image_size)
        channels = [image_channels] + [feature_maps * 2**i for i in range(halvings)]  # 3, 64, 128, 256
        layers = []
        for i, (before, after) in enumerate(zip(channels, channels[1:])):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=i == 0)]
            # none on the first layer: the paper found that batch norm next to the pixels makes training oscillate
            layers += [nn.BatchNorm2d(after)] if i else []
            layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(channels[-1], 1, kernel_size=last, stride=1, padding=0)]
        self.model = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, x):
        # at 32 pixels: (N, 3, 32, 32) -> (N, 64, 16, 16) -> (N, 128, 8, 8) -> (N, 256, 4, 4) -> (N, 1, 1, 1)
        return self.model(x).flatten()


def init_weights(module):
    """The paper's for convolutions, N(0, 0.02^2); its authors' code has N(1, 0.02^2) for batch norm scales."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_loss(real_logits, fake_logits):
    """Cross-entropy of D, -log D(x) - log(1 - D(G(z))), each a mean over the batch: Goodfellow et al. 2014, eq. (1).

    With D = sigmoid(l): -log D = softplus(-l) and -log(1 - D) = softplus(l). At D = 1/2 everywhere: 2 log 2 = 1.386.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """Non-saturating loss, -log D(G(z)) = softplus(-l), mean over the batch (the same paper, end of section 3)."""
    return F.softplus(-fake_logits).mean()


class Trainer:
    """Both networks, the averaged generator, the optimisers, and the training loop."""

    def __init__(self, run, train, score, generator_lr, discriminator_lr, ema_decay, score_every):
        self.run, self.train, self.score, self.ema_decay, self.score_every = run, train, score, ema_decay, score_every
        kwargs, device = run.model_kwargs, run.device
        self.latent_dim = kwargs["latent_dim"]
        self.generator = Generator(**kwargs).to(device)
        self.ema_generator = Generator(**kwargs).to(device).requires_grad_(False).eval()
        self.ema_generator.load_state_dict(self.generator.state_dict())
        pairs = zip(self.ema_generator.state_dict().values(), self.generator.state_dict().values())
        self.averaged = [(ema, now) for ema, now in pairs if ema.is_floating_point()]  # counters are not averaged
        sizes = {key: kwargs[key] for key in ("feature_maps", "image_channels", "image_size")}
        self.discriminator = Discriminator(**sizes).to(device)
        adam = dict(betas=(0.5, 0.999), fused=True)  # the paper's beta1; fused is one call for all tensors
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=generator_lr, **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=discriminator_lr, **adam)
        self.fixed_z = torch.randn(500, self.latent_dim).to(device)  # every picture is drawn from these
        reals = train.batch(torch.arange(min(500, len(train)), device=device))[0]
        self.real_distance = common.mean_distance(reals)

    def step(self, real):
        """One step of D, then one of G. real (N, C, H, W) in [-1, 1]; returns scalars, still on the device."""
        z = torch.randn(len(real), self.latent_dim, device=real.device)
        fake = self.generator(z)  # (N, C, H, W)

        # real and fake in passes of their own: each batch norm sees one kind of image, as the paper's authors advise
        real_logits = self.discriminator(real)  # (N,)
        fake_logits = self.discriminator(fake.detach())  # detached: this loss teaches only D
        d_loss = discriminator_loss(real_logits, fake_logits)
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
        self.average()

        return {"discriminator loss": d_loss, "generator loss": g_loss,
                "D(x)": real_logits.sigmoid().mean(), "D(G(z))": fake_logits.sigmoid().mean()}

    @torch.no_grad()
    def average(self):
        """ema = decay ema + (1 - decay) G, for weights and batch norm statistics alike.

        The decay grows from 0.18 as (1 + t) / (10 + t) to ema_decay, so that the first weights are soon forgotten.
        """
        t = self.generator.model[1].num_batches_tracked  # batch norm counts the steps, on the device
        weight = (9 / (10 + t)).clamp(min=1 - self.ema_decay)
        for ema, now in self.averaged:
            ema.lerp_(now, weight)

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_dim) -> images (N, C, H, W) in [-1, 1] of the averaged generator, in eval mode."""
        return self.ema_generator(z)

    def draw(self, index):
        """As many new images, (N, C, H, W) in [-1, 1], as index (N,) is long."""
        return self.sample(torch.randn(len(index), self.latent_dim, device=self.run.device))

    def fit(self):
        """Train to num_epochs, continuing from a checkpoint if there is one."""
        run = self.run
        state = {"generator": self.generator, "ema_generator": self.ema_generator, "discriminator": self.discriminator,
                 "generator_optimizer": self.generator_optimizer,
                 "discriminator_optimizer": self.discriminator_optimizer}
        step = run.fast_step(self.step)
        for epoch in run.epochs(self.train, state):
            for images, _ in run.batches():
                run.log(step(images))
            samples = self.sample(self.fixed_z)
            # 1 is as varied as the data; towards 0 the samples become all alike: mode collapse
            measured = {"diversity": common.mean_distance(samples) / self.real_distance}
            if self.score:  # nan, not drawn, in the epochs between
                measured[self.score.name] = self.score(self.draw) if epoch % self.score_every == 0 else float("nan")
            run.end_epoch(**measured)
            if run.sampling:
                common.save_grid(samples[:64], run.folder / f"generated_image_epoch_{epoch}.png", columns=8)
                panels = {"loss (nats)": ["discriminator loss", "generator loss"],
                          "probability of being real": ["D(x)", "D(G(z))"],
                          "mean distance, real images = 1": ["diversity"]}
                if self.score:
                    panels[f"{self.score.name} (N {self.score.n:,})"] = [self.score.name]
                common.save_curves(run.history, panels, f"main_dcgan on {self.train.name}",
                                   run.folder / f"train_loss_curve_{epoch}.png")
                run.save_weights(generator=self.ema_generator)


def load_generator(weights_path):
    """Rebuild the generator of a weights_epoch_{E}.pt, in eval mode. Raises common.BadInput for any other file."""
    weights = common.load(weights_path, "main_dcgan", "generator")
    generator = Generator(**weights["model_kwargs"])
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer."""
    run = training.Run(__file__, model_kwargs, dataset_kwargs, **trainer_kwargs)
    kind = dataset_kwargs["dataset_type"]
    size = dataset_kwargs["image_size"] or {"mnist": 28, "digits": 28, "sprites": 16}.get(kind, 32)
    channels = 1 if kind == "mnist" else model_kwargs["image_channels"]
    run.model_kwargs.update(image_channels=channels, image_size=size)  # sampling rebuilds the networks from these
    train, test = datasets.load_data(**{**dataset_kwargs, "image_size": size}, channels=channels, device=run.device)
    features, score = run.trainer_kwargs.pop("score_features"), None
    if trainer_kwargs["score_every"]:
        score = fid.Scorer(train, test, 10000, features, dataset_kwargs["data_dir"])
    trainer = Trainer(run, train, score, **run.trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
