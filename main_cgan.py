"""A conditional GAN (cGAN) on MNIST, which draws the class it is asked for; also on sprites, CIFAR-10, your own images.

paper:  Mirza and Osindero 2014, Conditional Generative Adversarial Nets, https://arxiv.org/abs/1411.1784
        Miyato and Koyama 2018, cGANs with Projection Discriminator, https://arxiv.org/abs/1802.05637 (`projection`)
run:    python main_cgan.py                         (--dataset_type sprites for pixel art; any key below is an option)
writes: mnist_CGAN/: generated_image_epoch_{E}.png (a row a class, a column a z), train_loss_curve_{E}.png, history.csv,
        training.gif, checkpoint.pt (the same command continues from it), weights_epoch_{E}.pt (for sampling)
expect: MNIST, 20 epochs, seed 0: a classifier sees the asked digit in 99.6 % of 10,000 samples (98.3 % in the worst
        class), diversity within a class is 0.91 of the data's (worst 0.88); after 5 epochs 98.8 % (97.6 %) and 0.95
"""
import io

import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import fid
import training

model_kwargs = {
    "latent_dim": 100,  # >= 1; entries of the latent vector z ~ N(0, I)
    "embedding_dim": 50,  # >= 1; entries of the learned vector that stands for a class; it is joined to z
    "feature_maps": 16,  # >= 1; channels next to the image; they double with every halving of its side
    "conditioning": "projection",  # concat | projection; D sees the class as channels beside the image, or as V_y
    "image_channels": 3,  # 1 | 3; grey or colour; mnist is grey whatever stands here
}
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | sprites | cifar10 | folder | digits; folder: a sub-folder a class
    "batch_size": 32,  # >= 1; images a step
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # train on the bundled digits, with a warning, where the data cannot be had
    "image_size": 0,  # 0 | 16 | 28 | 32 | 64; pixels a side; 0 is the data set's own (sprites: 16, folder: 32)
    "horizontal_flip": False,  # mirror every other training image at random: for objects, not for digits
}
trainer_kwargs = {
    "num_epochs": 20,  # >= 0; may grow later: the run continues; 0 only checks settings and data
    "generator_lr": 0.0005,  # > 0; Adam's; at 0.001 a class collapsed (seed 1); 0.00001 leaves grey blurs of sprites
    "discriminator_lr": 0.0005,  # > 0; Adam's learning rate
    "ema_decay": 0.999,  # in [0, 1); pictures and weights show G averaged over about 1000 steps; 0 is G itself
    "output_dir": "mnist_CGAN",  # everything is written there
    "score_every": 0,  # >= 0; epochs between Frechet distances of 10,000 samples to the training images; 0 is never
    "score_features": "classifier",  # inception | classifier; see fid.py: only with inception is it the FID
    "sample_every": 1,  # >= 1; epochs between pictures, the frames of training.gif; one also after the first and last
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
    """z (N, latent_dim), labels (N,) in 0 ... num_classes - 1 -> images (N, C, H, W) in [-1, 1]."""

    def __init__(self, latent_dim, embedding_dim, feature_maps, image_channels, image_size, num_classes):
        super().__init__()
        self.latent_dim, self.embedding = latent_dim, nn.Embedding(num_classes, embedding_dim)
        first, doublings = sides(image_size)
        channels = [feature_maps * 2**i for i in reversed(range(doublings))] + [image_channels]  # of digits: 32, 16, 1
        layers = [nn.ConvTranspose2d(latent_dim + embedding_dim, channels[0], kernel_size=first, bias=False)]
        for narrow, wide in zip(channels[1:], channels):
            # batch norm subtracts the mean, so the convolution before it needs no bias
            layers += [nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1, bias=False)]
        self.model = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)
        # five times smaller than z: from N(0, 1) the label drowned z, and each class had one picture
        nn.init.normal_(self.embedding.weight, 0.0, 0.2)

    def forward(self, z, labels):
        # at 28 pixels: (N, 150, 1, 1) -> (N, 32, 7, 7) -> (N, 16, 14, 14) -> (N, 1, 28, 28)
        return self.model(torch.cat([z, self.embedding(labels)], dim=1)[:, :, None, None])

    @torch.no_grad()
    def sample(self, labels, z=None):
        """One image for each of `labels`, N class numbers; z (N, latent_dim) is drawn if it is not given."""
        labels, classes = torch.as_tensor(labels, device=self.embedding.weight.device), self.embedding.num_embeddings
        if labels.ndim != 1 or labels.is_floating_point() or not ((labels >= 0) & (labels < classes)).all():
            raise common.BadInput(f"labels are {labels.tolist()}; legal: whole numbers from 0 to {classes - 1}")
        return self(torch.randn(len(labels), self.latent_dim, device=labels.device) if z is None else z, labels.long())


class Discriminator(nn.Module):
    """Images (N, C, H, W) in [-1, 1], labels (N,) -> logit (N,) of being real and of this class.

    conditioning `concat`: a channel for each class joins the image, all 1 for the label's and all 0 for the others.
    `projection`: the logit is psi(phi(x)) + V_y . phi(x), Miyato and Koyama, eq. (3); phi are the features of the
    image alone, and a learned direction V_y says which of them speak for class y.
    """

    def __init__(self, feature_maps, conditioning, image_channels, image_size, num_classes):
        super().__init__()
        self.conditioning, layers = conditioning, []
        last, halvings = sides(image_size)
        channels = [image_channels + (num_classes if conditioning == "concat" else 0)]
        channels += [feature_maps * 2**i for i in range(halvings)]
        for i, (before, after) in enumerate(zip(channels, channels[1:])):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=i == 0)]
            # none on the first layer: DCGAN's authors found that batch norm next to the pixels makes training oscillate
            layers += [nn.BatchNorm2d(after)] if i else []
            layers += [nn.LeakyReLU(0.2)]
        self.phi, self.psi = nn.Sequential(*layers), nn.Conv2d(channels[-1], 1, kernel_size=last)
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)
        if conditioning == "projection":
            self.directions = nn.Embedding(num_classes, channels[-1] * last**2)
        self.apply(init_weights)
        if conditioning == "projection":
            nn.init.normal_(self.directions.weight, 0.0, 0.02)  # as the convolution psi beside it

    def forward(self, x, labels):
        if self.conditioning == "concat":
            x = torch.cat([x, self.one_hot[labels][:, :, None, None].expand(-1, -1, *x.shape[2:])], dim=1)
        features = self.phi(x)  # at 28 pixels: (N, 1 or 11, 28, 28) -> (N, 16, 14, 14) -> (N, 32, 7, 7)
        logits = self.psi(features).flatten()
        if self.conditioning == "projection":
            logits = logits + (self.directions(labels) * features.flatten(1)).sum(1)
        return logits


def init_weights(module):
    """DCGAN's for convolutions, N(0, 0.02^2); its authors' code has N(1, 0.02^2) for batch norm scales."""
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

    def __init__(self, run, train, score, conditioning, generator_lr, discriminator_lr, ema_decay, score_every):
        self.run, self.train, self.score, self.ema_decay, self.score_every = run, train, score, ema_decay, score_every
        kwargs, device, self.num_classes = run.model_kwargs, run.device, run.model_kwargs["num_classes"]
        self.generator = Generator(**kwargs).to(device)
        self.ema_generator = Generator(**kwargs).to(device).requires_grad_(False).eval()
        self.ema_generator.load_state_dict(self.generator.state_dict())
        pairs = zip(self.ema_generator.state_dict().values(), self.generator.state_dict().values())
        self.averaged = [(ema, now) for ema, now in pairs if ema.is_floating_point()]  # counters are not averaged
        sizes = {key: kwargs[key] for key in ("feature_maps", "image_channels", "image_size", "num_classes")}
        self.discriminator = Discriminator(conditioning=conditioning, **sizes).to(device)
        adam = dict(betas=(0.5, 0.999), fused=True)  # DCGAN's beta1; fused is one call for all tensors
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=generator_lr, **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=discriminator_lr, **adam)
        self.fixed_z = torch.randn(1000, kwargs["latent_dim"]).to(device)  # every picture is drawn from these
        index = torch.arange(1000, device=device)
        self.fixed_labels = index % self.num_classes
        self.real_distances = fid.distance_within_classes(*train.batch(index[:len(train)]))

    def step(self, real, labels):
        """One step of D, then one of G. real (N, C, H, W) in [-1, 1], labels (N,); returns scalars, on the device."""
        z = torch.randn(len(real), self.generator.latent_dim, device=real.device)
        fake = self.generator(z, labels)  # (N, C, H, W): the classes of the real batch, so D cannot tell by these

        # real and fake in passes of their own: each batch norm sees one kind of image, as DCGAN's authors advise
        real_logits = self.discriminator(real, labels)  # (N,)
        fake_logits = self.discriminator(fake.detach(), labels)  # detached: this loss teaches only D
        d_loss = discriminator_loss(real_logits, fake_logits)
        self.discriminator_optimizer.zero_grad()
        d_loss.backward()
        training.average_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()

        # G is judged by the D that has just learnt; `inputs` spares the gradients of D's weights
        g_loss = generator_loss(self.discriminator(fake, labels))
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

    def sample(self, labels, z=None):
        """Images (N, C, H, W) in [-1, 1] of the classes `labels`, of the averaged generator, in eval mode."""
        return self.ema_generator.sample(labels, z)

    def draw(self, index):
        """New images (N, C, H, W) in [-1, 1], and their labels: the number of the image modulo that of the classes."""
        labels = index.to(self.run.device) % self.num_classes
        return self.sample(labels), labels

    def fit(self):
        """Train to num_epochs, continuing from a checkpoint if there is one."""
        run = self.run
        state = {name: getattr(self, name) for name in ("generator", "ema_generator", "discriminator",
                                                        "generator_optimizer", "discriminator_optimizer")}
        step = run.fast_step(self.step)
        for epoch in run.epochs(self.train, state):
            for images, labels in run.batches():
                run.log(step(images, labels))
            # 1 is as varied as the data; towards 0 a class has one picture left: mode collapse
            made = fid.distance_within_classes(self.sample(self.fixed_labels, self.fixed_z), self.fixed_labels)
            shares = [made[c] / real for c, real in self.real_distances.items() if real and c in made] or [float("nan")]
            spread = {"diversity within class": sum(shares) / len(shares), "diversity within class, worst": min(shares)}
            draw = self.draw if self.score and epoch % self.score_every == 0 else None  # else nan, which is not drawn
            run.end_epoch(**spread, **(self.score.columns(draw) if self.score else {}))
            if run.sampling:
                rows, z = self.train.class_names[:50], self.fixed_z[:10]
                samples = self.sample(torch.arange(len(rows)).repeat_interleave(10), z.repeat(len(rows), 1))
                save_named_grid(samples, rows, f"{self.train.name}, epoch {epoch}",
                                run.folder / f"generated_image_epoch_{epoch}.png")
                panels = {"loss (nats)": ["discriminator loss", "generator loss"],
                          "probability of being real": ["D(x)", "D(G(z))"], "mean distance, real images = 1": [*spread]}
                if self.score:
                    panels[f"{self.score.name} (N {self.score.n:,})"] = [self.score.name, "mean class distance"]
                    panels["share seen as the asked class"] = ["asked class", "asked class, worst"]
                common.save_curves(run.history, panels, f"main_cgan on {self.train.name}",
                                   run.folder / f"train_loss_curve_{epoch}.png")
                run.save_weights(generator=self.ema_generator)
        save_animation(run)


def save_named_grid(images, names, title, path):
    """Write images (10 n, C, H, W) as a PNG with n rows, the name of each beside it, and a title."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    common.save_grid(images, path, columns=10)
    grid, font = Image.open(path), ImageFont.load_default(14)
    left = 12 + int(max(map(font.getlength, names)))
    draw = ImageDraw.Draw(canvas := ImageOps.expand(grid, (left, 24, 0, 0), "white"))
    draw.text((left, 12), title, "black", font, anchor="lm")
    for row, name in enumerate(names):
        draw.text((left - 6, 24 + grid.height * (row + 0.5) / len(names)), name, "black", font, anchor="rm")
    canvas.save(buffer := io.BytesIO(), "PNG")
    common.write(path, buffer.getvalue())


def save_animation(run):
    """training.gif of the pictures so far. They are read from the disk, so those before an interruption are there."""
    from PIL import Image

    paths = [run.folder / f"generated_image_epoch_{e}.png" for e in range(1, run.epoch + 1)
             if e in (1, run.epoch) or e % run.sample_every == 0]
    if frames := [Image.open(path) for path in paths if path.is_file()]:
        frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[250] * (len(frames) - 1) + [2000])  # milliseconds
        common.write(run.folder / "training.gif", buffer.getvalue())


def load_generator(weights_path):
    """Rebuild the generator of a weights_epoch_{E}.pt, in eval mode. Raises common.BadInput for any other file."""
    weights = common.load(weights_path, "main_cgan", "generator")
    generator = Generator(**weights["model_kwargs"])
    generator.load_state_dict(weights["generator"])
    return generator.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer."""
    run = training.Run(__file__, model_kwargs, dataset_kwargs, **trainer_kwargs)
    kind = dataset_kwargs["dataset_type"]
    size = dataset_kwargs["image_size"] or {"mnist": 28, "digits": 28, "sprites": 16}.get(kind, 32)
    channels = 1 if kind == "mnist" else model_kwargs["image_channels"]
    train, test = datasets.load_data(**{**dataset_kwargs, "image_size": size}, channels=channels, device=run.device)
    if len(train.class_names) < 2:
        raise common.BadInput(f"{train.name} has one class; put each class into a sub-folder, or take main_dcgan.py")
    run.model_kwargs.update(image_channels=channels, image_size=size, num_classes=len(train.class_names))
    features, score = run.trainer_kwargs.pop("score_features"), None
    if trainer_kwargs["score_every"]:
        score = fid.Scorer(train, test, 10000, features, dataset_kwargs["data_dir"])
    # conditioning is D's alone: sampling rebuilds G from the rest
    trainer = Trainer(run, train, score, run.model_kwargs.pop("conditioning"), **run.trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
