"""GAN, LSGAN, WGAN-GP or hinge GAN on the birds of CUB-200-2011 at 32x32; also on CIFAR-10 or your own images.

paper:  GAN: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661; LSGAN: Mao et al. 2016, arXiv 1611.04076; WGAN-GP
        and the networks: Gulrajani et al. 2017, arXiv 1704.00028; hinge, spectral norm: Miyato et al. 2018, 1802.05957
run:    python gan_cub.py                           (any key below is an option: --loss lsgan)
        python gan_cub.py --experiment losses       (all four in turn, compared)
        python fid.py --generated cub_GAN/weights_best.pt --num_images 50000
writes: cub_GAN/: samples_{I}.png, interpolations_{I}.png, fid_vs_iterations.png, history.csv, weights_best.pt and
        weights_iteration_{I}.pt (for sampling), checkpoint.pt (the same command continues from it);
        an experiment: such a folder for each loss, losses.png, losses.csv
expect: 5,430 other birds (CUB-200, 2010), width 32, batch 32, lr 0.0008, 4,500 iterations, seed 0, bfloat16,
        classifier distance at the end, N 2,000: gan 1070, lsgan 636, wgan-gp 278, hinge 762; 18 min of an AMD EPYC core
"""
import io
import math

import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import fid
import training

model_kwargs = {
    "latent_dim": 128,  # >= 2; entries of the latent vector z ~ N(0, I)
    "feature_maps": 128,  # >= 1; channels of every layer, in both networks
}
dataset_kwargs = {
    "dataset_type": "cub",  # cub | cifar10 | folder | digits; digits is the bundled sample of MNIST, in colour
    "batch_size": 256,  # >= 1; images an iteration
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # with a warning: digits for data, the classifier for Inception, if they cannot be had
    "image_size": 32,  # 16 | 32 | 64; pixels a side; of cub the whole photograph, not a crop
    "jpeg_quality": 0,  # in [0, 100]; resized images of cub are compressed to this (the course's: 75); 0: they are not
}
trainer_kwargs = {
    "loss": "wgan-gp",  # gan | lsgan | wgan-gp | hinge; hinge also puts a spectral norm on the discriminator
    "num_iterations": 30000,  # >= 0; steps of D, over which the learning rate falls to 0; a multiple of eval_every
    "eval_every": 1000,  # >= 1; iterations between pictures, weights and scores; a multiple of d_steps
    "d_steps": 5,  # >= 1; steps of D for one of G
    "lr": 0.0002,  # > 0; Adam's learning rate at the start, of both networks
    "gp_weight": 10.0,  # >= 0; lambda, the weight of the gradient penalty of wgan-gp
    "ema_decay": 0.999,  # in [0, 1); pictures, weights and scores are of G averaged over 1000 of its steps; 0: of G
    "precision": "auto",  # auto | float32 | tf32 | bfloat16; of the networks' arithmetic; auto: bfloat16 if fast
    "score_features": "inception",  # inception | classifier; see fid.py: only with inception is it the FID
    "score_images": 10000,  # >= 0; generated images a score is taken of; 0 leaves the scores out
    "experiment": "none",  # none | losses; losses trains gan, lsgan, wgan-gp and hinge, to compare
    "output_dir": "cub_GAN",  # everything is written there
    "seed": 0,  # in [0, 4294967295]; of weights, order and noise: on a CPU the same seed gives the same bytes
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
    "num_threads": 0,  # >= 0; CPU threads; 0 is torch's own choice, all cores: right for convolutions
    "cuda_graph": True,  # on an NVIDIA GPU each step is recorded once and replayed; false is the plain loop
    "resume": True,  # continue from output_dir/checkpoint.pt; false starts over
}


class ResBlock(nn.Module):
    """(N, before, H, W) -> (N, after, H', W'), which are 2H or H/2 or H: `scale` is Upsample, AvgPool2d or Identity."""

    def __init__(self, before, after, norm, scale, pixels=False):
        super().__init__()
        self.residual = nn.Sequential(
            norm(before), nn.Identity() if pixels else nn.ReLU(),  # a ReLU of pixels would lose the darker half
            nn.Conv2d(before, after, kernel_size=3, padding=1, bias=norm is nn.Identity),  # batch norm undoes a bias
            norm(after), nn.ReLU(), scale, nn.Conv2d(after, after, kernel_size=3, padding=1))
        shortcut = [scale] if isinstance(scale, nn.Identity) else [scale, nn.Conv2d(before, after, kernel_size=1)]
        if isinstance(scale, nn.Upsample):
            shortcut.reverse()  # a 1x1 convolution before the repetition gives the same at a quarter of the cost
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, 3, H, W) float32 in [-1, 1]."""

    def __init__(self, latent_dim, feature_maps, image_size):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_dim, feature_maps * 4 * 4), nn.Unflatten(1, (feature_maps, 4, 4)),
            *(ResBlock(feature_maps, feature_maps, nn.BatchNorm2d, nn.Upsample(scale_factor=2, mode="nearest"))
              for _ in range(int(math.log2(image_size / 4)))),
            nn.BatchNorm2d(feature_maps), nn.ReLU(), nn.Conv2d(feature_maps, 3, kernel_size=3, padding=1))

    def forward(self, z):
        # at 32 pixels: (N, 2048) -> (N, 128, 4, 4) -> (N, 128, 8, 8) -> (N, 128, 16, 16) -> (N, 128, 32, 32)
        return self.model(z).float().tanh()  # (N, 3, 32, 32)


class Discriminator(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> logit (N,) float32, high for real ones.

    Each is judged by itself, without batch norm: the penalty is on the gradient of a single image's logit.
    """

    def __init__(self, feature_maps, image_size, spectral_norm):
        super().__init__()
        first, *others = [nn.AvgPool2d(2)] * int(math.log2(image_size / 8)) + [nn.Identity()] * 2
        self.blocks = nn.Sequential(ResBlock(3, feature_maps, nn.Identity, first, pixels=True), *(
            ResBlock(feature_maps, feature_maps, nn.Identity, scale) for scale in others), nn.ReLU())
        self.linear = nn.Linear(feature_maps, 1)
        if spectral_norm:  # divides a weight by its largest singular value, estimated by one power iteration a pass
            for layer in [part for part in self.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]:
                nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x):
        # at 32 pixels: (N, 128, 16, 16) -> (N, 128, 8, 8), which stays -> (N, 128)
        return self.linear(self.blocks(x).float().sum(dim=(2, 3))).squeeze(1).float()


# of a logit l: D's loss on a real image, D's on a generated one, G's on a generated one; batches take the mean
LOSSES = {"gan": (lambda l: F.softplus(-l), lambda l: F.softplus(l), lambda l: F.softplus(-l)),
          # -log D, -log(1 - D), -log D with D = sigmoid(l): Goodfellow et al., eq. (1); G's is their non-saturating one
          "lsgan": (lambda l: 0.5 * (l - 1)**2, lambda l: 0.5 * l**2, lambda l: 0.5 * (l - 1)**2),
          # Mao et al., eq. (2) with a = 0, b = c = 1
          "wgan-gp": (lambda l: -l, lambda l: l, lambda l: -l),  # Gulrajani et al., eq. (3); the penalty is below
          "hinge": (lambda l: F.relu(1 - l), lambda l: F.relu(1 + l), lambda l: -l)}  # Miyato et al., eq. (16), (17)


def gradient_penalty(critic, real, fake, epsilon):
    """(|gradient of the critic at epsilon x + (1 - epsilon) G(z)| - 1)^2, batch mean; Gulrajani et al., eq. (3).

    real, fake (N, C, H, W), cut off from what made them; epsilon (N, 1, 1, 1) in [0, 1); the norm is over C, H and W.
    """
    mixed = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_()
    gradient, = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)  # of a sum: each image's own
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Trainer:
    """Both networks, the averaged generator, the optimisers, and the training loop."""

    def __init__(self, run, train, score, loss, num_iterations, d_steps, lr, gp_weight, ema_decay, precision):
        self.run, self.train, self.score, self.loss, self.d_steps = run, train, score, loss, d_steps
        self.real_loss, self.fake_loss, self.generator_loss = LOSSES[loss]
        self.num_iterations, self.lr, self.gp_weight, self.ema_decay = num_iterations, lr, gp_weight, ema_decay
        kind, kwargs, self.latent_dim = run.device.type, run.model_kwargs, run.model_kwargs["latent_dim"]
        # autocast keeps no weights in bfloat16: they would go stale, since D changes d_steps times within a step
        self.precision = dict(device_type=kind, dtype=torch.bfloat16, cache_enabled=False,
                              enabled=common.set_precision(precision, run.device))
        place = dict(device=run.device, memory_format=torch.channels_last)  # channels side by side in memory
        self.generator, self.ema_generator = (Generator(**kwargs).to(**place) for _ in range(2))
        self.ema_generator.requires_grad_(False).eval().load_state_dict(self.generator.state_dict())
        self.discriminator = Discriminator(kwargs["feature_maps"], kwargs["image_size"], loss == "hinge").to(**place)
        self.lr_now = torch.tensor(lr, device=run.device)  # on the device, so that a captured step can change it
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=self.lr_now, betas=(0.0, 0.9), fused=True)
            for network in (self.generator, self.discriminator))
        self.fixed_z = torch.randn(100, self.latent_dim).to(run.device)  # every picture is drawn from these
        self.plane = self.fixed_z[:1].repeat(100, 1)  # the first of them, with two entries swept over [-1, 1]
        self.plane[:, :2] = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 10, device=run.device)])
        self.real_distance = common.mean_distance(train.images.pixels[:100] / 127.5)

    def discriminator_step(self, real):
        """One step of D on real (N, 3, H, W) in [-1, 1] and as many generated images: an iteration."""
        with torch.no_grad():  # this loss teaches only D
            fake = self.generator(torch.randn(len(real), self.latent_dim, device=real.device))
        # without batch norm, real and generated images can go through D together
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        loss = self.real_loss(real_logits).mean() + self.fake_loss(fake_logits).mean()
        values = {"discriminator loss": loss, "real logit": real_logits.mean(), "fake logit": fake_logits.mean()}
        if self.loss == "wgan-gp":
            epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
            values["gradient penalty"] = penalty = gradient_penalty(self.discriminator, real, fake, epsilon)
            loss = loss + self.gp_weight * penalty
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        training.average_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()
        return values

    def generator_step(self, count):
        """One step of G on count images; returns its loss."""
        fake = self.generator(torch.randn(count, self.latent_dim, device=self.run.device))
        loss = self.generator_loss(self.discriminator.eval()(fake)).mean()  # eval: D's spectral norms stay as they are
        self.discriminator.train()
        self.generator_optimizer.zero_grad()
        loss.backward(inputs=list(self.generator.parameters()))  # spares the gradients of D's weights
        training.average_gradients(self.generator_optimizer)
        self.generator_optimizer.step()
        self.average()
        return loss

    def step(self, real):
        """d_steps iterations, then one step of G. real (d_steps N, 3, H, W) in [-1, 1]; returns scalars."""
        with torch.autocast(**self.precision):
            rounds = [self.discriminator_step(part) for part in real.chunk(self.d_steps)]
            values = {name: torch.stack([one[name] for one in rounds]).mean() for name in rounds[0]}
            return values | {"generator loss": self.generator_step(len(real) // self.d_steps)}

    @torch.no_grad()
    def average(self):
        """ema = decay ema + (1 - decay) G, statistics too; the decay grows as (1 + t) / (10 + t) up to ema_decay."""
        t = self.generator.model[-3].num_batches_tracked / (self.d_steps + 1)  # batch norm counts passes, on the device
        for ema, now in zip(self.ema_generator.state_dict().values(), self.generator.state_dict().values()):
            if ema.is_floating_point():  # counters are not averaged
                ema.lerp_(now, (9 / (10 + t)).clamp(min=1 - self.ema_decay))

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_dim) -> images (N, 3, H, W) in [-1, 1] of the averaged generator, in eval mode."""
        with torch.autocast(**self.precision):
            return self.ema_generator(z)

    def fit(self):
        """Train to num_iterations, continuing from a checkpoint if there is one."""
        run = self.run
        state = {name: getattr(self, name) for name in ("generator", "ema_generator", "discriminator",
                                                        "generator_optimizer", "discriminator_optimizer")}
        step = run.fast_step(self.step)
        for period in run.epochs(self.train, state):
            for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
                optimizer.param_groups[0]["lr"] = self.lr_now  # a restored one brings a number of its own
            for images, _ in run.batches():
                done = ((period - 1) * self.train.steps + run.step) * self.d_steps
                self.lr_now.fill_(self.lr * (1 - done / self.num_iterations))
                run.log(step(images))
            self.evaluate(period * run.each)

    def evaluate(self, iteration):
        """This iteration's row of the history, weights and pictures."""
        run, score, samples = self.run, self.score, self.sample(self.fixed_z)
        measured = {"diversity": common.mean_distance(samples) / self.real_distance}  # towards 0 all are alike
        panels = {"loss": ["discriminator loss", "generator loss"], "mean logit": ["real logit", "fake logit"],
                  "mean distance, real images = 1": ["diversity"]}
        if score:
            measured[score.name] = score(lambda i: self.sample(torch.randn(len(i), self.latent_dim).to(run.device)))
            panels = {f"{score.name} (N {score.n:,})": [score.name]} | panels
        run.end_epoch(**measured)
        if not run.sampling:  # of several processes the first one writes
            return
        run.save_weights(generator=self.ema_generator)
        if score and measured[score.name] == min(run.history[score.name]):
            weights = (run.folder / f"weights_iteration_{iteration}.pt").read_bytes()
            common.write(run.folder / "weights_best.pt", weights)
        common.save_grid(samples, run.folder / f"samples_{iteration}.png", columns=10)
        common.save_grid(self.sample(self.plane), run.folder / f"interpolations_{iteration}.png", columns=10)
        common.save_curves(run.history, panels, f"gan_cub ({self.loss}) on {self.train.name}",
                           run.folder / ("fid_vs_iterations.png" if score else "train_loss_curve.png"))


def load_generator(weights_path):
    """Rebuild the generator of a weights_iteration_{I}.pt or weights_best.pt, in eval mode. Raises common.BadInput."""
    weights = common.load(weights_path, "gan_cub", "generator")
    generator = Generator(**weights["model_kwargs"])
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer, or {loss: Trainer} of an experiment."""
    common.check(__file__, {**model_kwargs, **dataset_kwargs, **trainer_kwargs})
    if trainer_kwargs["experiment"] != "none":
        return compare(model_kwargs, dataset_kwargs, trainer_kwargs)
    options = {key: value for key, value in trainer_kwargs.items() if key != "experiment"}
    iterations, each, d_steps = (options[key] for key in ("num_iterations", "eval_every", "d_steps"))
    if iterations % each or each % d_steps:
        raise common.BadInput(f"eval_every {each} must divide num_iterations {iterations}, and d_steps {d_steps} it")
    run = training.Run(__file__, model_kwargs, dataset_kwargs, num_epochs=iterations // each, sample_every=1, **options)
    run.unit, run.each = "iteration", each  # more iterations than that would need another slope of the learning rate
    run.model_kwargs["image_size"] = dataset_kwargs["image_size"]  # sampling rebuilds the networks from these
    train, test = datasets.load_data(**dataset_kwargs, shuffle=True, channels=3, device=run.device)
    _, count, features = (run.trainer_kwargs.pop(key) for key in ("eval_every", "score_images", "score_features"))
    try:
        score = count and fid.Scorer(train, test, count, features, dataset_kwargs["data_dir"],
                                     fall_back=dataset_kwargs["allow_fallback"])
    except common.BadInput as error:
        if not dataset_kwargs["allow_fallback"]:
            raise common.BadInput(f"{error}; or leave the scores out with --score_images 0")
        score = common.say(f"WARNING: NO SCORES. {error}.", None)
    if score and run.checkpoint and run.checkpoint["epoch"] and score.name not in run.checkpoint["history"]:
        raise common.BadInput(f"{run.path} was scored otherwise than by the {score.name}; give another --output_dir")
    stream = datasets.Stream(train, dataset_kwargs["batch_size"] * d_steps, each // d_steps)
    trainer = Trainer(run, stream, score, **run.trainer_kwargs)
    trainer.fit()
    return trainer


def compare(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train each loss in a folder of its own, unless that is done; then the scores and samples of all, and a table."""
    from matplotlib import figure as drawing, image

    folder, trainers = trainer_kwargs["output_dir"], {}
    for loss in LOSSES:
        print(f"losses: {loss}", flush=True)
        options = {**trainer_kwargs, "experiment": "none", "loss": loss, "output_dir": f"{folder}/{loss}"}
        trainers[loss] = one = main(model_kwargs, dataset_kwargs, options)
    if not (one.score and one.num_iterations):
        return trainers
    figure, name = drawing.Figure(figsize=(13, 6), layout="constrained"), one.score.name
    axes = figure.subplot_mosaic([["curves", "gan", "lsgan"], ["curves", "wgan-gp", "hinge"]], width_ratios=(2, 1, 1))
    table = f"loss,best {name},at iteration,last {name},last diversity\n"
    for loss, trainer in trainers.items():
        iterations, scores, diversity = (trainer.run.history[key] for key in ("iteration", name, "diversity"))
        best = scores.index(min(scores))
        table += f"{loss},{scores[best]:.5g},{iterations[best]},{scores[-1]:.5g},{diversity[-1]:.3f}\n"
        axes["curves"].plot(iterations, scores, marker="o", markersize=3, label=loss)
        axes[loss].imshow(image.imread(trainer.run.folder / f"samples_{iterations[-1]}.png"))
        axes[loss].set(title=f"{loss}: {scores[-1]:.4g}", xticks=[], yticks=[])
    axes["curves"].grid(alpha=0.3)
    axes["curves"].set(xlabel="iteration", ylabel=f"{name} (N {one.score.n:,})", xlim=(0, None), ylim=(0, None))
    axes["curves"].legend()
    figure.suptitle(f"gan_cub on {one.train.name}: {name}, and samples after the last iteration", fontsize=10)
    figure.savefig(buffer := io.BytesIO(), dpi=110)
    common.write(f"{folder}/losses.png", buffer.getvalue())
    common.write(f"{folder}/losses.csv", table.encode())
    print(table)
    return trainers


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
