"""A conditional GAN (cGAN), which draws the class
it is asked for, on MNIST; also on your images.

paper:  Mirza and Osindero 2014, Conditional Generative
        Adversarial Nets, https://arxiv.org/abs/1411.1784
        Miyato and Koyama 2018, cGANs with Projection
        Discriminator, https://arxiv.org/abs/1802.05637
        (conditioning `projection`)
        Radford et al. 2015, Unsupervised Representation Learning
        with DCGANs, https://arxiv.org/abs/1511.06434
        (the layers)
run:    python main_cgan.py --num_epochs 20         (all keys of the dicts are options)
        torchrun --nproc_per_node=2 main_cgan.py    (two processes, a batch each)
writes: mnist_CGAN/. After every epoch: history.csv, run.html
        (open it to watch: the folder's pictures, and curves),
        checkpoint.pt (also at Ctrl-C; the same command continues
        from it).
        After the first, the last and each sample_every-th:
        generated_image_epoch_{E}.png (a row for each class, a
        column for each z), train_loss_curve_{E}.png,
        weights_epoch_{E}.pt (for sampling). At the end:
        training.gif (the pictures over the epochs)
differs from the papers: convolutions and learned class vectors
        (2014: fully connected layers, one-hot classes);
        cross-entropy, no spectral norm, D weighs every place of
        its map (2018: hinge, with it, D sums over the places, and
        G's batch norm depends on the class); pictures and weights
        are of an averaged G (ema_decay)
expect: MNIST, 20 epochs, seed 0, float32, by fid.py with
        --features classifier: the asked digit is seen in 99.6 %
        of 10,000 samples (98.3 % in the worst class); diversity
        within a class 0.91, worst 0.88; after 5 epochs 98.8 %
        (97.6 %) and 0.95
"""

import io
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
    "latent_dim": 100,  # entries of the latent vector z ~ N(0, I)
    "embedding_dim": 50,  # entries of the learned vector of a class, beside z
    "feature_maps": 16,  # channels of the largest map; they double as the side halves
    "conditioning": "projection",  # concat | projection: how D sees the class
    "image_channels": 3,  # 3 colour, 1 grey; mnist and fashion_mnist are always grey
}
# Your own images: a folder of them (dataset_type
# "folder"), or from Python any torch Dataset in
# place of "mnist": see `main`.
dataset_kwargs = {
    "dataset_type": "mnist",  # mnist | fashion_mnist | cifar10 | cub | sprites | folder | digits
    "batch_size": 32,  # images a step, in each process
    "shuffle": True,  # a new order every epoch
    "data_dir": "data",  # where data are, or are downloaded to; for folder, your images
    "allow_fallback": True,  # without data: the bundled digits, with a warning
    "image_size": 0,  # 16 | 28 | 32 | 64; 0: the data's own (MNIST 28; a folder 32)
    "horizontal_flip": False,  # mirror training images with probability 1/2: not for digits
}
trainer_kwargs = {
    "num_epochs": 20,  # may be raised later; 0 only checks settings and data
    "generator_lr": 0.0005,  # Adam's rate; at 0.001 one class collapsed with seed 1
    "discriminator_lr": 0.0005,  # Adam's learning rate
    "ema_decay": 0.999,  # the averaged G is shown, saved and scored; 0: G itself
    "precision": "float32",  # auto | float32 | bfloat16, which was slower on two cores
    "score_every": 0,  # epochs between scores of 10,000 samples; 0: none
    "score_features": "classifier",  # inception (the FID) | classifier
    "output_dir": "mnist_CGAN",  # everything is written there
}
run_kwargs = {
    "seed": 0,  # fixes weights, order and noise; a CPU run repeats exactly, also if continued
    "device": "auto",  # auto: cuda, else mps, else cpu; or one by name: cuda:1
    "num_threads": 0,  # CPU threads; 0 is torch's choice, all cores
    "cuda_graph": True,  # on an NVIDIA GPU replay a recorded step: faster, see `step`
    "resume": True,  # go on from checkpoint.pt; false: start over; the old run is moved aside
    "sample_every": 1,  # epochs between pictures and weights; first and last have them
}

# {image_size: (side of the smallest feature
# map, doublings from it to the image)};
# for another size add an entry
SIDES = {16: (4, 2), 28: (7, 2), 32: (4, 3), 64: (4, 4)}


def check_settings(settings):
    """Refuse impossible values, in one line and before any work.

    settings: {key: value}. The other keys of dataset_kwargs are
    checked by common.load_data, those of run_kwargs by
    training.Run. A common.BadInput ends with exit status 2.
    """
    for key in ("latent_dim", "embedding_dim", "feature_maps"):
        common.require(settings[key] >= 1, f"{key} must be at least 1")
    known = settings["conditioning"] in ("concat", "projection")
    common.require(known, "conditioning must be concat or projection")
    common.require(settings["image_channels"] in (1, 3), "image_channels must be 1 or 3")
    sides = "image_size must be 16, 28, 32 or 64, or 0 for the data set's own"
    common.require(settings["image_size"] in (0, *SIDES), sides)
    for key in ("num_epochs", "score_every"):
        common.require(settings[key] >= 0, f"{key} must be at least 0")
    for key in ("generator_lr", "discriminator_lr"):
        common.require(settings[key] > 0, f"{key} must be above 0")
    common.require(0 <= settings["ema_decay"] < 1, "ema_decay must be at least 0 and below 1")
    legal = ("auto", "float32", "bfloat16")
    common.require(settings["precision"] in legal, f"precision must be one of {', '.join(legal)}")
    known = settings["score_features"] in ("inception", "classifier")
    common.require(known, "score_features must be inception or classifier")


class Generator(nn.Module):
    """z (N, latent_dim), labels (N,) -> images (N, C, H, W) in [-1, 1].

    Shapes are for 28 pixels and 16 feature maps.
    """

    def __init__(
        self, latent_dim, embedding_dim, feature_maps, image_channels, image_size, num_classes
    ):
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.embedding = nn.Embedding(num_classes, embedding_dim)
        side, doublings = SIDES[image_size]
        width = feature_maps * 2 ** (doublings - 1)  # 32 channels
        # batch norm subtracts the mean, so no bias is needed before
        # it; G's last layer has none either, as in pytorch/examples
        inputs = latent_dim + embedding_dim
        layers = [nn.ConvTranspose2d(inputs, width, kernel_size=side, bias=False)]
        layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())  # (N, 32, 7, 7)
        up = dict(kernel_size=4, stride=2, padding=1, bias=False)  # twice the side
        for _ in range(doublings - 1):
            layers.append(nn.ConvTranspose2d(width, width // 2, **up))
            layers.append(nn.BatchNorm2d(width // 2))
            layers.append(nn.ReLU())  # (N, 16, 14, 14)
            width = width // 2
        layers.append(nn.ConvTranspose2d(width, image_channels, **up))  # (N, 1, 28, 28)
        layers.append(nn.Tanh())  # the range of the data
        self.model = nn.Sequential(*layers)
        self.apply(init_weights)
        # With a standard deviation of 0.2 the entries of a class's
        # vector are five times smaller than those of z. With 1, G
        # ignored z, and all samples of a class were the same picture.
        nn.init.normal_(self.embedding.weight, 0.0, 0.2)

    def forward(self, z, labels):
        z = torch.cat([z, self.embedding(labels)], dim=1)  # (N, latent_dim + embedding_dim)
        return self.model(z[:, :, None, None]).float()  # from (N, latent_dim + embedding_dim, 1, 1)

    @torch.no_grad()
    def sample(self, labels):
        """A new image for each of `labels`,
        a list or tensor of class numbers.
        """
        labels = torch.as_tensor(labels, device=self.embedding.weight.device)
        whole = labels.ndim == 1 and not labels.is_floating_point()
        known = whole and ((labels >= 0) & (labels < self.num_classes)).all()
        last = self.num_classes - 1
        common.require(known, f"labels must be a list of whole numbers from 0 to {last}")
        z = torch.randn(len(labels), self.latent_dim, device=labels.device)
        return self(z, labels.long())


class Discriminator(nn.Module):
    """Images (N, C, H, W), labels (N,) ->
    logit (N,) of being real and of this class.

    conditioning `concat`: a channel for each class is joined to
    the image. It is all 1 for the class of the label, and all 0
    for the others. `projection`: the logit is
    psi(phi(x)) + V_y . phi(x), eq. (3) of Miyato and Koyama. phi
    are the features of the image, without its label; a learned
    direction V_y says which of them speak for class y.
    """

    def __init__(self, feature_maps, conditioning, image_channels, image_size, num_classes):
        super().__init__()
        self.conditioning, self.num_classes = conditioning, num_classes
        side, halvings = SIDES[image_size]
        width = feature_maps
        down = dict(kernel_size=4, stride=2, padding=1)  # half the side
        if conditioning == "concat":
            image_channels = image_channels + num_classes
        # The first layer has no batch norm: DCGAN's paper found
        # that next to the pixels it makes training oscillate.
        layers = [nn.Conv2d(image_channels, width, **down)]
        # negative inputs keep a gradient, which G learns from
        layers.append(nn.LeakyReLU(0.2))  # (N, 16, 14, 14)
        for _ in range(halvings - 1):
            layers.append(nn.Conv2d(width, 2 * width, bias=False, **down))
            layers.append(nn.BatchNorm2d(2 * width))
            layers.append(nn.LeakyReLU(0.2))  # (N, 32, 7, 7)
            width = 2 * width
        self.phi = nn.Sequential(*layers)
        self.psi = nn.Conv2d(width, 1, kernel_size=side)  # (N, 1, 1, 1)
        if conditioning == "projection":
            self.directions = nn.Embedding(num_classes, width * side**2)
        self.apply(init_weights)
        if conditioning == "projection":
            nn.init.normal_(self.directions.weight, 0.0, 0.02)  # as psi's weights

    def forward(self, x, labels):
        if self.conditioning == "concat":
            one_hot = F.one_hot(labels, self.num_classes).float()  # (N, num_classes)
            channels = one_hot[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, channels], dim=1)  # (N, C + num_classes, H, W)
        features = self.phi(x)
        logits = self.psi(features).flatten()  # (N,)
        if self.conditioning == "projection":
            directions = self.directions(labels)  # (N, width * side^2)
            logits = logits + (directions * features.flatten(1)).sum(1)
        return logits.float()


def init_weights(module):
    """Weights of convolutions from N(0, 0.02^2), as DCGAN's paper says.

    Batch norm's scales from N(1, 0.02^2), as in DCGAN's authors' code.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


# For another loss, change these two functions, and give another
# --output_dir. Where D's sigmoid is no longer a probability,
# leave it out in `step`, and change the titles in `draw_curves`.


def discriminator_loss(real_logits, fake_logits):
    """Cross-entropy of D in nats:
    the negative of eq. (1) of Goodfellow et al. 2014.

    It is -log D(x) - log(1 - D(G(z))), with D the sigmoid of
    the logit. Both terms are means over the batch. At D = 1/2
    everywhere the sum is 2 log 2 = 1.386. torch computes it
    from the logit, since the log of a sigmoid that has rounded
    to 0 is infinite.
    """
    real_targets = torch.ones_like(real_logits)
    fake_targets = torch.zeros_like(fake_logits)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_targets)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_targets)
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """Non-saturating loss -log D(G(z)), mean over
    the batch (section 3 of Goodfellow et al.).

    The minimax form log(1 - D(G(z))) would hardly teach a bad G:
    its gradient with respect to the logit has size D(G(z)), which
    is near 0 just then. Here it is 1 - D(G(z)), near 1.
    """
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def mean_distance(images):
    """Mean Euclidean distance over all pairs of images (N, ...):
    0 when all are alike.
    """
    # on the CPU, since not every device has pdist
    return F.pdist(images.flatten(1).cpu()).mean().item()


def distance_within_classes(images, labels):
    """{label: mean_distance of its images},
    of labels with two images or more.
    """
    distances = {}
    for label in labels.unique().tolist():
        same = images[labels == label]
        if len(same) > 1:
            distances[label] = mean_distance(same)
    return distances


def make_networks(train, latent_dim, embedding_dim, feature_maps, conditioning, image_channels):
    """(generator, its average, discriminator)
    for images such as those of `train`.
    """
    image_size, num_classes = train.pixels.shape[2], len(train.class_names)
    generator = Generator(
        latent_dim, embedding_dim, feature_maps, image_channels, image_size, num_classes
    )
    ema_generator = Generator(
        latent_dim, embedding_dim, feature_maps, image_channels, image_size, num_classes
    )
    ema_generator.load_state_dict(generator.state_dict())
    ema_generator.requires_grad_(False).eval()
    discriminator = Discriminator(
        feature_maps, conditioning, image_channels, image_size, num_classes
    )
    networks = generator, ema_generator, discriminator
    return [network.to(train.device) for network in networks]


def make_adam(network, lr):
    """Adam with beta1 0.5, as in DCGAN's
    paper, where 0.9 made training oscillate.

    `fused` updates all tensors of a network at once.
    """
    return torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999), fused=True)


class Trainer:
    """The networks, their optimisers, and the training loop.

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
    gradients over the processes, and training.Run
    averages batch norm's running statistics. What `step`
    returns is in the history as a mean over them, what is
    given to run.end_epoch is the first one's. Only the
    first one writes files and prints. A run can be
    continued only with as many processes as it had.

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
        embedding_dim,
        feature_maps,
        conditioning,
        image_channels,
        num_epochs,
        generator_lr,
        discriminator_lr,
        ema_decay,
        precision,
        score_every,
        score_features,
        output_dir,
    ):
        self.run, self.train, self.folder = run, train, Path(output_dir)
        self.latent_dim, self.ema_decay, self.num_epochs = latent_dim, ema_decay, num_epochs
        self.bfloat16 = common.use_bfloat16(precision, train.device)
        self.generator, self.ema_generator, self.discriminator = make_networks(
            train, latent_dim, embedding_dim, feature_maps, conditioning, image_channels
        )
        # Tensors, so that a recorded step (see `step`) sees a new
        # rate. Adam holds these very tensors, also in a continued run.
        self.generator_lr = torch.tensor(generator_lr, device=train.device)
        self.discriminator_lr = torch.tensor(discriminator_lr, device=train.device)
        self.generator_optimizer = make_adam(self.generator, self.generator_lr)
        self.discriminator_optimizer = make_adam(self.discriminator, self.discriminator_lr)
        # the same at every epoch: ten for pictures, all for diversity
        self.fixed_z = torch.randn(1000, latent_dim).to(train.device)
        index = torch.arange(1000, device=train.device)  # load_data leaves nothing sorted
        self.fixed_labels = index % len(train.class_names)
        self.real_distances = distance_within_classes(*train.batch(index[: len(train)]))
        self.score_every, self.scorer = score_every, None
        if score_every and num_epochs:
            self.scorer = fid.Scorer(train, score_features, num_images=10000)

    def autocast(self):
        """A context in which the networks compute in
        bfloat16, if `precision` asks for it.

        Their weights and logits, the losses and the pictures
        are float32.
        """
        kind = self.train.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16)

    # On an NVIDIA GPU the work of one call of `step` is recorded
    # (a CUDA graph) and then repeated, with new noise but without
    # this Python: an `if` keeps the branch that was recorded, a
    # number keeps its value, and .item() is an error. So
    # keep in a tensor what changes, as the learning rate is.
    # --cuda_graph false turns the recording off.
    def step(self, real, labels):
        """One step of D, then one of G.
        real (N, C, H, W), labels (N,); returns scalars.

        For another column in history.csv add a tensor of shape ()
        to the dict that is returned; for a curve also to `panels`
        in draw_curves.
        """
        z = torch.randn(len(real), self.latent_dim, device=real.device)
        # Real and generated images pass D separately, since batch
        # norm is to see one kind at a time, as DCGAN's authors
        # advise. With detach, d_loss sends no gradient to G.
        with self.autocast():
            fake = self.generator(z, labels)  # (N, C, H, W), of the real images' classes
            real_logits = self.discriminator(real, labels)  # (N,)
            fake_logits = self.discriminator(fake.detach(), labels)  # (N,)
        d_loss = discriminator_loss(real_logits, fake_logits)
        self.discriminator_optimizer.zero_grad()
        d_loss.backward()
        # torchrun: the mean over all processes; alone: nothing
        training.all_reduce_gradients(self.discriminator_optimizer)
        self.discriminator_optimizer.step()

        # G is judged by the D that has just learnt. The first
        # `autocast` would reuse bfloat16 copies of D's old
        # weights, hence a second one.
        with self.autocast():
            g_loss = generator_loss(self.discriminator(fake, labels))
        self.generator_optimizer.zero_grad()
        g_loss.backward(inputs=list(self.generator.parameters()))  # none for D's weights
        training.all_reduce_gradients(self.generator_optimizer)
        self.generator_optimizer.step()
        self.update_ema()
        return {
            "discriminator loss": d_loss,
            "generator loss": g_loss,
            "D(x)": real_logits.sigmoid().mean(),
            "D(G(z))": fake_logits.sigmoid().mean(),
        }

    @torch.no_grad()
    def update_ema(self):
        """ema = decay ema + (1 - decay) G, for
        weights and for batch norm's statistics.

        After t steps the decay is (1 + t) / (10 + t),
        at most ema_decay, so that the first weights are
        soon forgotten. With 0.999 it becomes an average
        over about 1000 steps.
        """
        # model[1] is a batch norm. Its counter of steps
        # is a tensor, which a recorded step reads anew.
        t = self.generator.model[1].num_batches_tracked
        weight = (9 / (10 + t)).clamp(min=1 - self.ema_decay)  # 1 - decay
        averaged = self.ema_generator.state_dict()  # references, not copies
        for name, value in self.generator.state_dict().items():
            if value.is_floating_point():  # counters are not averaged
                averaged[name].lerp_(value, weight)

    @torch.no_grad()
    def sample(self, z, labels):
        """z (N, latent_dim), labels (N,)
        -> images (N, C, H, W) in [-1, 1].

        They come from the averaged generator in eval mode, where
        batch norm does not make a picture depend on the others
        of its batch.
        """
        return self.ema_generator(z, labels)

    def generate(self, index):
        """A new image for each entry of index (N,),
        and its label (N,), for the scorer.
        """
        z = torch.randn(len(index), self.latent_dim, device=self.train.device)
        labels = index % len(self.train.class_names)
        return self.sample(z, labels), labels

    def diversity(self):
        """{column: value}: how varied the images
        of a class are, as a mean and in the worst.

        It is the mean distance of two samples of the class over
        that of two real images: 1 is as varied as the data; towards
        0 all samples of the class become alike: mode collapse.
        """
        samples = self.sample(self.fixed_z, self.fixed_labels)
        distances = distance_within_classes(samples, self.fixed_labels)
        shares = []
        for label, real_distance in self.real_distances.items():
            if label in distances and real_distance > 0:
                shares.append(distances[label] / real_distance)
        if not shares:
            return {}
        return {
            "diversity within class": sum(shares) / len(shares),
            "diversity within class, worst": min(shares),
        }

    def fit(self):
        """Train to num_epochs.

        A checkpoint of other settings or data is refused; num_epochs,
        score_every, precision, data_dir and the run_kwargs other
        than the seed may change. Changed code is not noticed:
        then give another --output_dir, or --resume false.
        """
        run = self.run
        state = {
            "generator": self.generator,
            "ema_generator": self.ema_generator,
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
            for images, labels in run.batches():  # (N, C, H, W) in [-1, 1]; (N,)
                run.train_step(self.step, images, labels)
                # pictures at steps 0, 100, ... go here:
                # if run.step % 100 == 0:
                #     self.draw(f"{epoch}_step_{run.step}")
            # another column, measured once an epoch, goes into this dict
            measured = self.diversity()
            if self.scorer and epoch % self.score_every == 0:
                measured |= self.scorer(self.generate)
            history = run.end_epoch(measured)
            if run.pictures_due:
                self.draw(epoch)
                self.draw_curves(history, epoch)
                run.save_weights(f"weights_epoch_{epoch}.pt", generator=self.ema_generator)
        if self.num_epochs:
            self.draw_animation()

    def draw(self, name):
        """Write samples: a row for each class, of
        the first fifty, and a column for each z.
        """
        names = self.train.class_names[:50]
        labels = torch.arange(len(names), device=self.train.device).repeat_interleave(10)
        z = self.fixed_z[:10].repeat(len(names), 1)  # (10 * rows, latent_dim)
        title = f"{self.train.name}, epoch {name}"
        path = self.folder / f"generated_image_epoch_{name}.png"
        save_named_grid(self.sample(z, labels), names, title, path)

    def draw_curves(self, history, epoch):
        """Write the history so far, a list
        of rows {column: value}, as curves.
        """
        panels = {
            "loss (nats)": ["discriminator loss", "generator loss"],
            "probability of being real": ["D(x)", "D(G(z))"],
            "mean distance, real images = 1": [
                "diversity within class",
                "diversity within class, worst",
            ],
        }
        if self.scorer:
            label = f"{self.scorer.name} (N {self.scorer.num_images:,})"
            # of all samples, and the mean of the distances class by class
            panels[label] = [self.scorer.name, "mean class distance"]
            panels["share seen as the asked class"] = ["asked class", "asked class, worst"]
        title = f"main_cgan on {self.train.name}"
        common.save_curves(history, panels, title, self.folder / f"train_loss_curve_{epoch}.png")

    def draw_animation(self):
        """Write training.gif of the pictures of all epochs.

        They are read from the disk, so that those
        before an interruption are there too.
        """
        from PIL import Image

        epochs = [row["epoch"] for row in self.run.history]
        frames = []
        for epoch in epochs:
            due = epoch in (1, epochs[-1]) or epoch % self.run.sample_every == 0
            path = self.folder / f"generated_image_epoch_{epoch}.png"
            if due and path.is_file():
                with Image.open(path) as picture:
                    frames.append(picture.copy())
        if not frames:
            return
        buffer = io.BytesIO()
        frames[0].save(
            buffer,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            loop=0,
            duration=[250] * (len(frames) - 1) + [2000],  # milliseconds
        )
        common.write(self.folder / "training.gif", buffer.getvalue())


def save_named_grid(images, names, title, path):
    """Write images (10 * n, C, H, W) in [-1, 1] as
    n rows of ten, each with its name beside it.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from torchvision.utils import make_grid

    grid = make_grid(images.cpu(), nrow=10, normalize=True, value_range=(-1, 1), pad_value=0.5)
    pixels = (255 * grid).round().byte().permute(1, 2, 0)  # (height, width, 3)
    picture = Image.fromarray(pixels.numpy())
    zoom = max(1, round(480 / picture.width))  # small pictures are enlarged by whole pixels
    picture = ImageOps.scale(picture, zoom, Image.Resampling.NEAREST)
    font = ImageFont.load_default(14)
    left = 12 + max(int(font.getlength(name)) for name in names)  # the margin for the names
    page = ImageOps.expand(picture, (left, 24, 0, 0), "white")
    draw = ImageDraw.Draw(page)
    draw.text((left, 12), title, "black", font, anchor="lm")
    for row, name in enumerate(names):
        middle = 24 + picture.height * (row + 0.5) / len(names)
        draw.text((left - 6, middle), name, "black", font, anchor="rm")
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    common.write(path, buffer.getvalue())


def load_generator(weights_path):
    """The generator of a weights_epoch_{E}.pt.
    Raises common.BadInput for any other file.

    To sample the digits 2, 0, 2 and 6:
        generator = main_cgan.load_generator(path)
        images = generator.sample([2, 0, 2, 6])  # (4, C, H, W)
        common.save_grid(images, "samples.png", columns=4)
    """
    weights = common.load_weights(weights_path, __file__, "generator")
    kwargs, data = weights["model_kwargs"], weights["data"]
    generator = Generator(
        kwargs["latent_dim"],
        kwargs["embedding_dim"],
        kwargs["feature_maps"],
        kwargs["image_channels"],
        image_size=data["shape"][1],
        num_classes=len(data["class_names"]),
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
    check_settings({**model_kwargs, **dataset_kwargs, **trainer_kwargs})
    if dataset_kwargs["dataset_type"] in ("mnist", "fashion_mnist"):
        model_kwargs = {**model_kwargs, "image_channels": 1}  # they are grey
    # __file__: checkpoints and weights say which script wrote them
    run = training.Run(__file__, model_kwargs, dataset_kwargs, trainer_kwargs, **run_kwargs)
    # a GAN has no use for the test images
    train, _ = common.load_data(
        **dataset_kwargs,
        image_channels=model_kwargs["image_channels"],
        device=run_kwargs["device"],
    )
    sub_folders = "put each class into a sub-folder, or take main_dcgan.py"
    common.require(len(train.class_names) > 1, f"{train.name} has one class; {sub_folders}")
    trainer = Trainer(run, train, **model_kwargs, **trainer_kwargs)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    # the options of the command line replace values of the dicts
    common.run_script(main, model_kwargs, dataset_kwargs, trainer_kwargs, run_kwargs)
