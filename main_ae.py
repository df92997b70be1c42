"""A convolutional autoencoder, VAE or beta-VAE on CIFAR-10; also on MNIST or your own images, at multiples of 8 pixels.

paper:  Kingma and Welling 2013, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114
        Burgess et al. 2018, Understanding disentangling in beta-VAE, https://arxiv.org/abs/1804.03599
run:    python main_ae.py                           (any key below is an option: --model_type ae --latent_dim 128)
        python main_ae.py --experiment latent_sizes (or betas, or schedule: several settings, compared)
        python main_ae.py --experiment model_types --dataset_type mnist --latent_dim 2 --output_dir mnist_AE
writes: cifar10_VAE/: reconstruction_epoch_{E}.png, generated_image_epoch_{E}.png, train_loss_curve_{E}.png,
        latent_space_epoch_{E}.png (if latent_dim is 2), history.csv, weights_epoch_{E}.pt (for sampling),
        checkpoint.pt (the same command continues from it); an experiment: such a folder per setting, .png, .csv
expect: test squared error per image, 20 epochs of CIFAR-10: AE with 16, 128, 1024 latents 199.6, 53.9, 24.1; VAE with
        1024 133.3, KL 59.2; beta 0.8 122.5, KL 69.7; linear 117.2, KL 72.4; bfloat16, --num_threads 1, seed 0: about
        40 min each on an AMD EPYC core, torch 2.15
"""
import copy
import io

import torch
from torch import nn
from torch.nn import functional as F

import common
import datasets
import training

model_kwargs = {
    "model_type": "vae",  # ae | vae; ae has neither noise nor KL; a beta-VAE is a vae with another beta
    "latent_dim": 1024,  # >= 1; entries of the latent vector z
    "feature_maps": 32,  # >= 1; channels of the first convolution; they double with every halving of the side
    "image_channels": 3,  # 1 | 3; grey or colour, which also decides the loss; mnist is grey whatever stands here
}
dataset_kwargs = {
    "dataset_type": "cifar10",  # mnist | cifar10 | sprites | folder | digits; digits is the bundled sample of MNIST
    "batch_size": 256,  # >= 1; images a step
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where the data lie or are downloaded to; for folder: the directory of images
    "allow_fallback": True,  # train on the bundled digits, with a warning, where the data cannot be had
    "image_size": 32,  # >= 8; pixels a side, a multiple of 8: MNIST's 28 are padded to 32
}
trainer_kwargs = {
    "num_epochs": 20,  # >= 0; may grow later: the run continues; 0 only checks settings and data
    "lr": 0.001,  # > 0; Adam's learning rate
    "beta": 1.0,  # >= 0; weight of the KL: 1 is the VAE, 0 an autoencoder with noise
    "beta_schedule": "constant",  # constant | linear; linear: 0 in epoch 1, beta / beta_epochs more in each, up to beta
    "beta_epochs": 20,  # >= 1; of the linear schedule: beta itself is reached in the epoch after these
    "ema_decay": 0.99,  # in [0, 1); test, pictures, weights are of networks averaged over 100 steps; 0: of the last
    "precision": "auto",  # auto | float32 | tf32 | bfloat16; of the networks' arithmetic; auto: bfloat16 if fast
    "experiment": "none",  # none | latent_sizes | betas | schedule | model_types; trains several settings to compare
    "output_dir": "cifar10_VAE",  # everything is written there
    "sample_every": 5,  # >= 1; epochs between pictures; one also after the first epoch and the last
    "seed": 0,  # in [0, 4294967295]; of weights, order and noise: on a CPU the same seed gives the same bytes
    "device": "auto",  # auto takes cuda, else mps, else cpu; or name one, such as cpu or cuda:1
    "num_threads": 0,  # >= 0; CPU threads; 0 is torch's own choice, all cores: right for convolutions
    "cuda_graph": True,  # on an NVIDIA GPU each step is recorded once and replayed; false is the plain loop
    "resume": True,  # continue from output_dir/checkpoint.pt; false starts over
}
EXPERIMENTS = dict(  # the settings of each; everything else is as the dicts or the command line say
    latent_sizes=[{"model_type": "ae", "latent_dim": size} for size in (16, 128, 1024)],
    betas=[{"model_type": "vae", "beta": beta} for beta in (0.8, 1.0, 1.2)],
    schedule=[{"model_type": "vae", "beta_schedule": schedule} for schedule in ("constant", "linear")],
    model_types=[{"model_type": "ae"}, {"model_type": "vae", "beta": 1.0}, {"model_type": "vae", "beta": 4.0}],
)


class Encoder(nn.Module):
    """Images (N, C, H, W) -> mu and logvar, both (N, latent_dim) float32; logvar is None in a plain autoencoder."""

    def __init__(self, model_type, latent_dim, feature_maps, image_channels, image_size):
        super().__init__()
        # the networks for grey and for colour come from two sources, which differ in the kernel and the activation
        kernel, activation = (4, nn.LeakyReLU(0.01)) if image_channels == 1 else (3, nn.ReLU())
        channels = [feature_maps * 2**i for i in range(4)]  # 32, 64, 128, 256
        layers = [nn.Conv2d(image_channels, channels[0], kernel_size=3, stride=1, padding=1)]
        for before, after in zip(channels, channels[1:]):
            layers += [activation, nn.Conv2d(before, after, kernel_size=kernel, stride=2, padding=1)]
        self.model = nn.Sequential(*layers, *([activation] if image_channels == 1 else []), nn.Flatten())
        features = channels[-1] * (image_size // 8) ** 2
        self.fc_mean = nn.Linear(features, latent_dim)
        self.fc_logvar = nn.Linear(features, latent_dim) if model_type == "vae" else None

    def forward(self, x):
        # at 32 pixels: (N, 3, 32, 32) -> (N, 32, 32, 32) -> (N, 64, 16, 16) -> (N, 128, 8, 8) -> (N, 256, 4, 4)
        features = self.model(x)  # (N, 4096)
        mu = self.fc_mean(features).float()
        return mu, self.fc_logvar(features).float() if self.fc_logvar else None


class Decoder(nn.Module):
    """z (N, latent_dim) -> (N, C, H, W): the image itself in colour, logits of the pixels in grey."""

    def __init__(self, latent_dim, feature_maps, image_channels, image_size, model_type=None):
        super().__init__()
        activation = nn.LeakyReLU(0.01) if image_channels == 1 else nn.ReLU()
        first = feature_maps * (8 if image_channels == 1 else 4)
        channels = [first, 4 * feature_maps, 2 * feature_maps, feature_maps]  # 128, 128, 64, 32 in colour
        side = image_size // 8
        self.input_layer = nn.Linear(latent_dim, first * side * side)
        layers = [nn.Unflatten(1, (first, side, side)), *([] if image_channels == 1 else [activation])]
        for before, after in zip(channels, channels[1:]):
            layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), activation]
        self.model = nn.Sequential(*layers)
        self.last_layer = nn.Conv2d(feature_maps, image_channels, kernel_size=3, stride=1, padding=1)

    def forward(self, z):
        # at 32 pixels: (N, 2048) -> (N, 128, 4, 4) -> (N, 128, 8, 8) -> (N, 64, 16, 16) -> (N, 32, 32, 32)
        return self.last_layer(self.model(self.input_layer(z))).float()  # (N, 3, 32, 32)

    @torch.no_grad()
    def sample(self, z):
        """z (N, latent_dim) -> images: colour (N, 3, H, W) in [-1, 1], grey (N, 1, H, W) in [0, 1]."""
        output = self(z)
        return output.sigmoid() if output.shape[1] == 1 else output.clamp(-1, 1)


def reparameterize(mu, logvar):
    """z = mu + sigma noise, noise ~ N(0, I): a sample through which gradients reach both; without logvar z is mu."""
    return mu if logvar is None else mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def reconstruction_loss(output, x):
    """Error of the decoder's output for images x, both (N, C, H, W): summed over pixels, mean over the batch.

    Colour, x in [-1, 1]: squared error, which is -log N(x; output, 1/2 I) up to a constant. Grey, x in [0, 1]: the
    cross-entropy -log p(x) of one coin a pixel, in nats, from logits. A sum, because log p of an image is the sum over
    its pixels, as the KL is one over latents: with a mean over pixels beta would be 3072 times what it says.
    """
    if x.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(output, x, reduction="sum") / len(x)
    return F.mse_loss(output, x, reduction="sum") / len(x)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)) = 1/2 sum(mu^2 + sigma^2 - log sigma^2 - 1), in nats, mean over the batch.

    Kingma and Welling, appendix B; summed over latents; both (N, latent_dim). 0 for an autoencoder (logvar None).
    """
    if logvar is None:
        return torch.zeros((), device=mu.device)
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum() / len(mu)


class Trainer:
    """Encoder and decoder, trained and averaged, the optimiser, and the training loop."""

    def __init__(self, run, train, test, lr, beta, beta_schedule, beta_epochs, ema_decay, precision):
        self.run, self.train, self.test = run, train, test
        self.bfloat16 = common.set_precision(precision, run.device)  # weights and losses are float32 all the same
        self.target_beta, self.beta_epochs = beta, beta_epochs if beta_schedule == "linear" else 0
        self.ema_decay = ema_decay
        # channels last: the pixels' channels lie side by side in memory, which makes a step on a CPU 1.3 times as fast
        place = dict(device=run.device, memory_format=torch.channels_last)
        self.encoder, self.decoder = (part(**run.model_kwargs).to(**place) for part in (Encoder, Decoder))
        self.ema_encoder, self.ema_decoder = copy.deepcopy((self.encoder, self.decoder))
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.averaged = [*zip([*self.ema_encoder.parameters(), *self.ema_decoder.parameters()], self.parameters)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)  # fused: one call for all tensors
        self.beta = torch.zeros((), device=run.device)  # on the device, so that it can change in a captured step
        # every picture is drawn from these latents and these test images
        self.fixed_z = torch.randn(49, run.model_kwargs["latent_dim"]).to(run.device)
        self.fixed_images = test.batch(torch.linspace(0, len(test) - 1, 36, device=run.device).long())[0]

    def losses(self, encoder, decoder, x):
        """Images (N, C, H, W) -> loss, reconstruction and KL: mean over the batch; z is sampled, also in validation."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            mu, logvar = encoder(x)
            output = decoder(reparameterize(mu, logvar))
        reconstruction, kl = reconstruction_loss(output, x), kl_divergence(mu, logvar)
        return reconstruction + self.beta * kl, reconstruction, kl

    def step(self, x):
        """One step of Adam on images x (N, C, H, W); returns scalars, still on the device."""
        loss, reconstruction, kl = self.losses(self.encoder, self.decoder, x)
        self.optimizer.zero_grad()
        loss.backward()
        training.average_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, max_norm=1.0)  # a sum over pixels has gradients of length 400 to 500
        self.optimizer.step()
        self.average()
        return {"loss": loss, "reconstruction": reconstruction, "KL": kl}

    @torch.no_grad()
    def average(self):
        """ema = decay ema + (1 - decay) now, for every weight: the noise of single steps cancels.

        The decay grows from 0.18 as (1 + t) / (10 + t) to ema_decay, so that the first weights are soon forgotten.
        """
        t = self.optimizer.state[self.parameters[0]]["step"]  # Adam counts the steps, on the device
        weight = (9 / (10 + t)).clamp(min=1 - self.ema_decay)
        for ema, now in self.averaged:
            ema.lerp_(now, weight)

    @torch.no_grad()
    def evaluate(self):
        """Loss, reconstruction and KL of the averaged networks on the test split, by the formulas of training."""
        networks = self.ema_encoder, self.ema_decoder
        index = torch.arange(len(self.test), device=self.run.device).split(self.test.batch_size)
        sums = [torch.stack(self.losses(*networks, self.test.batch(part)[0])) * len(part) for part in index]
        return dict(zip(["test_loss", "test_reconstruction", "test_KL"], (sum(sums) / len(self.test)).tolist()))

    def fit(self):
        """Train to num_epochs, continuing from a checkpoint if there is one."""
        run = self.run
        state = {"encoder": self.encoder, "decoder": self.decoder, "ema_encoder": self.ema_encoder,
                 "ema_decoder": self.ema_decoder, "optimizer": self.optimizer}
        step = run.fast_step(self.step)
        for epoch in run.epochs(self.train, state):
            # epochs count from 1 here, and from 0 in the source of the schedule: 0 to 0.95 beta in 20 epochs
            self.beta.fill_(self.target_beta * (min(1, (epoch - 1) / self.beta_epochs) if self.beta_epochs else 1))
            for images, _ in run.batches():
                run.log(step(images))
            run.end_epoch(**self.evaluate(), beta=self.beta.item())
            if run.sampling:  # after epochs 5, 10, 15 and 20, which are 4, 9, 14 and 19 counted from 0
                self.draw(epoch)
                run.save_weights(encoder=self.ema_encoder, decoder=self.ema_decoder)

    def draw(self, epoch):
        """This epoch's pictures: reconstructions, samples, curves, and the latent space where it is a plane."""
        run, x, low = self.run, self.fixed_images, -1 if self.train.normalize else 0
        encoder, decoder = self.ema_encoder, self.ema_decoder
        with torch.no_grad():
            rebuilt = decoder.sample(encoder(x)[0])  # from mu, the best guess: noise would only blur it
        pairs = torch.stack([x, rebuilt], dim=1).flatten(0, 1)  # original, reconstruction, original, ...
        common.save_grid(pairs, run.folder / f"reconstruction_epoch_{epoch}.png", columns=12, low=low)
        # an autoencoder's are noise of a kind: nothing has taught its decoder what to make of z ~ N(0, I)
        common.save_grid(decoder.sample(self.fixed_z), run.folder / f"generated_image_epoch_{epoch}.png", 7, low)
        names = ["reconstruction", "KL", "loss"] if encoder.fc_logvar else ["reconstruction"]
        panels = {f"{name} (per image)": [name, f"test {name}"] for name in names}
        common.save_curves(run.history, panels, f"main_ae ({run.model_kwargs['model_type']}) on {self.train.name}",
                           run.folder / f"train_loss_curve_{epoch}.png")
        if run.model_kwargs["latent_dim"] == 2:
            save_latent_space(encoder, decoder, self.test, run.folder / f"latent_space_epoch_{epoch}.png")


@torch.no_grad()
def save_latent_space(encoder, decoder, test, path, side=20):
    """The mu of every test image, coloured by class; beside it, over the same plane, what the decoder makes of it."""
    from matplotlib.figure import Figure

    index = torch.arange(len(test), device=test.pixels.device).split(test.batch_size)
    mu = torch.cat([encoder(test.batch(part)[0])[0] for part in index])  # (N, 2)
    low, high = mu.quantile(torch.tensor([0.01, 0.99], device=mu.device), dim=0)  # a few outliers stay outside
    middles = (torch.arange(side, device=mu.device) + 0.5) / side  # of the pictures, as fractions of the axes
    z = low + torch.cartesian_prod(middles.flip(0), middles).flip(1) * (high - low)  # a picture's first row is its top
    images = decoder.sample(z) / 2 + 0.5 if test.normalize else decoder.sample(z)  # (side * side, C, H, W) in [0, 1]
    grid = images.unflatten(0, (side, side)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, C)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for label, name in enumerate(test.class_names):
        left.scatter(*mu[test.labels == label].T.cpu(), s=3, color=f"C{label % 10}", label=name)
    left.legend(markerscale=4, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    left.set(title=f"{len(mu):,} test images of {test.name}", xlabel="first latent (mu)", ylabel="second latent (mu)")
    extent = torch.stack([low, high], dim=1).flatten().tolist()  # left, right, bottom, top
    right.imshow(grid.cpu().numpy(), extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1)
    right.set(title="what the decoder draws there", xlabel="first latent")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    common.write(path, buffer.getvalue())


def load_model(weights_path):
    """(encoder, decoder) of a weights_epoch_{E}.pt, in eval mode. Raises common.BadInput for any other file."""
    weights = common.load(weights_path, "main_ae", "decoder")
    encoder, decoder = Encoder(**weights["model_kwargs"]), Decoder(**weights["model_kwargs"])
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights["decoder"])
    return encoder.eval(), decoder.eval()


def main(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train with the given settings; returns the Trainer, or {setting: Trainer} of an experiment."""
    if trainer_kwargs["experiment"] != "none":
        return compare(model_kwargs, dataset_kwargs, trainer_kwargs)
    trainer_kwargs = {key: value for key, value in trainer_kwargs.items() if key != "experiment"}
    run = training.Run(__file__, model_kwargs, dataset_kwargs, **trainer_kwargs)
    size = dataset_kwargs["image_size"]
    if size % 8:
        raise common.BadInput(f"image_size {size} cannot be halved three times; legal: multiples of 8")
    channels = 1 if dataset_kwargs["dataset_type"] == "mnist" else model_kwargs["image_channels"]
    run.model_kwargs.update(image_channels=channels, image_size=size)  # loading rebuilds the networks from these
    train, test = datasets.load_data(**dataset_kwargs, channels=channels, device=run.device, normalize=channels == 3)
    training.keep_freed_memory()
    trainer = Trainer(run, train, test, **run.trainer_kwargs)
    trainer.fit()
    return trainer


def compare(model_kwargs, dataset_kwargs, trainer_kwargs):
    """Train each setting of an experiment in a folder of its own, unless that is done; then a figure and a table."""
    common.check(__file__, trainer_kwargs)
    experiment, folder, count = (trainer_kwargs[key] for key in ("experiment", "output_dir", "num_epochs"))
    trainers = {}
    for changes in EXPERIMENTS[experiment]:
        model, trainer = ({key: changes.get(key, value) for key, value in kwargs.items()}
                          for kwargs in (model_kwargs, {**trainer_kwargs, "experiment": "none"}))
        label = f"{model['model_type'].upper()} latent {model['latent_dim']}"
        label += f" beta {trainer['beta']:g} {trainer['beta_schedule']}" if model["model_type"] == "vae" else ""
        print(f"{experiment}: {label}", flush=True)
        trainer["output_dir"] = f"{folder}/{dataset_kwargs['dataset_type']}_{label.replace(' ', '_')}"
        trainers[label] = one = main(model, dataset_kwargs, trainer)
    if not count:
        return trainers
    names = ["epoch", "reconstruction", "test reconstruction", "test KL", "test loss"]
    table = ",".join(["setting", *names]) + "\n"
    for label, one in trainers.items():
        table += ",".join([label, *(f"{one.run.history[name][count - 1]:g}" for name in names)]) + "\n"
    common.write(f"{folder}/{experiment}.csv", table.encode())
    print(table)
    curves, panels = {"epoch": list(range(1, count + 1))}, {}
    for name in names[2:3 + ("VAE" in table)]:  # autoencoders have no KL
        panels[name] = [f"{label}: {name[5:]}" for label in trainers]
        curves |= {column: one.run.history[name][:count] for column, one in zip(panels[name], trainers.values())}
    common.save_curves(curves, panels, f"{experiment} on {one.train.name}", f"{folder}/{experiment}.png")
    return trainers


if __name__ == "__main__":
    common.run(main, model_kwargs, dataset_kwargs, trainer_kwargs)
