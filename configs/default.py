"""Every setting, with its unit and its meaning. The other files hold only what they change.

The values are those of MNIST 28x28 in the paper (DP-FETA, arXiv 2504.01395). The number after the colon of
`--config=mnist_28:1` is ε. The command line changes any setting: `--config.finetune.epochs=20`. Your own
config file starts like the others here: `from dpp_jax.configs import default`.
"""

from collections.abc import Callable
import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(epsilon: str = '10') -> ConfigDict:
    """The settings of a run with the budget ε given as text (the part after the colon)."""
    config = ConfigDict()
    config.name = 'mnist_28'  # appears in the report
    # Leave unset: keys then come from the operating system. A number makes a run repeatable and
    # therefore NOT private (anybody who guesses the number can remove the noise): tests only.
    config.seed = placeholder(int)

    config.dp = dp = ConfigDict()
    dp.epsilon = parse_epsilon(epsilon)  # the budget of the whole run, > 0
    dp.delta = 1e-5  # in (0, 1), and below 1 / number of private images
    dp.accountant = 'rdp'  # rdp (as the paper), or pld (tighter)
    # Which sets are neighbors: zero_out (one image counts as nothing; their number is public) | add_remove
    # (one image more; data.train_images is then a public guess, any number is taken) | replace_one (another
    # image in the place of one; takes twice the noise, and accountant pld).
    dp.relation = 'zero_out'
    # What neighbors differ in: image | group (all images of a person: data.groups, data.train_groups). With
    # image, a person with k images has k ε.
    dp.unit = 'image'
    dp.images_per_group = placeholder(int)  # group: so many images of each are used at most, >= 1; public
    # Earlier runs on the same private images, whose ε this budget includes: work directories, paths of a
    # ledger.jsonl or of a privacy_statement.json, separated by commas. '' = none.
    dp.already_spent = ''

    config.data = data = ConfigDict()
    # digits | folder:<path> or zip:<path> of image files | npz:<folder> | idx:<folder> |
    # tfds:<name>[/<config>][:<version>] | wilds-camelyon:<path>
    data.source = 'tfds:mnist'
    data.dir = ''  # where tensorflow-datasets keeps its data; '' = its own default
    # Whether a process keeps its share of the private images in memory: yes | no (rows are read from files
    # when a batch needs them; tfds only) | auto (no, if they are more than half of the memory). No result
    # depends on it.
    data.in_memory = 'auto'
    data.train_images = 60000  # number of private images; public (add_remove: any public number near it)
    # With dp.unit = 'group': what says whose an image is. npz: name of an array of integers in train.npz;
    # tfds: name of a feature (parts separated by '/'); folder, zip: column of the CSV in data.labels;
    # wilds-camelyon: patient or slide. '' = images are the unit.
    data.groups = ''
    # And the number of groups; public (add_remove: any public number near it). data.train_images is then any
    # public number near that of the images.
    data.train_groups = placeholder(int)
    data.image_size = 28  # pixels, after average_down
    data.channels = 1  # 1 or 3
    data.classes = 10  # labels are 0 .. classes - 1
    data.class_names = ()  # of the classes, in the order of labels; public; () = their numbers
    data.average_down = 1  # k: replace blocks of k x k pixels by their mean
    # How images of any size become squares of image_size (times average_down), gray or RGB as channels says:
    # none (they must be so) | crop (the square in the center) | pad (with black).
    data.fit = 'none'
    data.resize = 'area'  # area (mean of the pixels below) | lanczos
    # Of a set without a test part: the share of its images that are test images, in (0, 1), and the public
    # number that decides which, with the images' names.
    data.test_share = 0.1
    data.split_seed = 0
    # What becomes of a validation part beside train and test (folder, zip, tfds): unused | train (it is
    # private too).
    data.validation = 'unused'
    # Labels of folder and zip: folders (names of sub-folders) | dataset.json (as StyleGAN archives have it) |
    # path of a CSV with the columns file,label[,group] | none (one class). '' = dataset.json if it is there,
    # else folders.
    data.labels = ''
    # Of tfds: names of features, parts separated by '/', as in attributes/Male. label_key '' = one class.
    data.image_key = 'image'
    data.label_key = 'label'
    # Settings that the program read from the private images, because the config left them unset
    # (configs/folder.py). Their values are public. The program writes the list; leave it empty.
    data.derived = ()

    config.query = query = ConfigDict()  # the noisy central images; runs if pretrain.enabled
    query.kind = 'mean'  # mean | mode
    query.noise_multiplier = 5.0  # noise std / sensitivity, > 0
    # Instead of it: the share of ε, in (0, 1), that all queries alone may spend.
    query.epsilon_share = placeholder(float)
    query.sampling_probability = 0.1  # of each image in each query, in (0, 1]
    query.queries = 5  # how many times; each gives one central image per class
    query.downsample = 2  # keep every k-th pixel for the query; results are resized back
    query.pixel_center = 0.0  # subtracted from pixels in [0, 1]; 0 as the paper; in [0, 0.5]; mean only
    query.clip_norm = placeholder(
        float
    )  # L2 norm that centered images are clipped to; unset: none; mean only
    # What a class's sum is divided by: public (q N / classes: right for classes of equal size), or noisy
    # (its noisy count, 2 % more noise on the images: for unequal classes); mean only
    query.class_counts = 'public'
    query.bins = 2  # bins of the histograms; mode only
    query.post_process = True  # median filter, and sharpening of gray images

    # Also, after the central images and around them: per class the noisy mean and second moment of the lowest
    # frequencies of a cosine transform, of which images are drawn (pretrain.moments_steps,
    # generate.moments_share).
    config.moments = moments = ConfigDict()
    moments.enabled = False  # needs pretrain.enabled
    moments.noise_multiplier = 10.0  # as of query
    moments.epsilon_share = placeholder(float)  # of ε, that this query alone may spend; as of query
    moments.sampling_probability = 1.0  # of each image, in (0, 1]; it is asked once
    moments.average_down = 1  # k: blocks of k x k pixels are replaced by their mean; divides data.image_size
    moments.frequencies = 64  # how many, the lowest of all channels; noise grows with their number
    # B: L2 norm that an averaged image minus the center of its class, pixels in [0, 1], is clipped to.
    moments.clip_norm = 2.5
    moments.class_counts = 'public'  # public | noisy, as of query

    # Also, last: per class the noisy mean of random Fourier features. A small generator is fitted to it, of
    # whose images pre-training has a phase (pretrain.frequency_steps).
    config.frequency = frequency = ConfigDict()
    frequency.enabled = False  # needs pretrain.enabled
    frequency.noise_multiplier = 26.6  # as of query
    frequency.epsilon_share = placeholder(float)  # of ε, that this query alone may spend; as of query
    frequency.sampling_probability = 1.0  # of each image, in (0, 1]; it is asked once
    frequency.features = 10_000  # an even number; their norm together is 1
    # Width of the Gaussian kernel, over the root of the number of an image's values (pixels in [0, 1]).
    frequency.bandwidth = 0.366
    frequency.class_counts = 'public'  # public | noisy, as of query

    # --stage=import begins a run with a checkpoint of the PyTorch implementation (.pth or .safetensors), in
    # place of the stages that it has behind it. On the command line also config.import.path, and so on.
    config.imported = imported = ConfigDict()
    imported.path = ''  # of the file, on this machine; '' = none
    # What it was trained on. This declares what it spent of the budget: public (nothing: it saw no private
    # image) | pretrained (query.*, if that is what gave its central images) | finetuned (query.*, if
    # pretrain.enabled; and imported.noise_multiplier with finetune.batch_size, epochs and clip_norm).
    imported.kind = ''
    imported.noise_multiplier = placeholder(float)  # finetuned: of its DP-SGD, noise std / clip norm, > 0
    # Also read a file that holds more than tensors. It runs code when it is read: whose file is it?
    imported.trust = False

    config.export = export = ConfigDict()  # --stage=export writes the newest model for the PyTorch code
    export.path = ''  # .pth or .safetensors; '' = release/model/finetune.pth (or pretrain.pth)

    config.model = model = ConfigDict()
    model.network = 'unet'  # unet (NCSN++)
    model.width = 32  # channels of the first level
    model.multipliers = (2, 2)  # channels per level, in units of width
    model.blocks = 2  # residual blocks per level
    model.attention_resolutions = (14,)  # sizes of images in the network
    # Blocks of so many pixels squared are one pixel in the network, with as many more channels: 2 takes a
    # quarter of the time.
    model.patch = 1
    model.denoiser = 'edm'  # edm | vp | ve | v
    # What the denoiser is around: none (the scaled noised image alone, as the paper) | moments (the best
    # linear denoiser of the class moments, which the network sees and corrects; with moments.enabled).
    model.around = 'none'
    model.dtype = 'float32'  # of activations: float32 | bfloat16; parameters are float32

    config.pretrain = pretrain = ConfigDict()  # on central images: costs no privacy
    pretrain.enabled = True  # False: plain DP-SGD diffusion with the whole budget
    pretrain.batch_size = 64  # images
    # Passes over the central images; 0 only with moments_steps or frequency_steps.
    pretrain.epochs = 2000
    # Then: steps, of batch_size each, on images drawn from the class moments, which are not augmented.
    pretrain.moments_steps = 0
    # Then: likewise, on images of a generator, which is fitted to the answer of the frequency query.
    pretrain.frequency_steps = 0
    pretrain.generator_steps = 1000  # of that fit
    pretrain.draws = 1  # noise draws per image
    pretrain.learning_rate = 3e-4  # of Adam
    pretrain.schedule = 'constant'  # of the learning rate, as of finetune
    pretrain.ema_decay = 0.999  # of the averaged weights, after its warm-up
    pretrain.label_dropout = 0.1  # probability of training without the label
    pretrain.augmentation = 'rand_augment'  # rand_augment | affine | none
    pretrain.rand_augment = ConfigDict()
    pretrain.rand_augment.operations = 2  # per image
    pretrain.rand_augment.magnitude = 3  # m: each operation's level is drawn from 1 .. m, of 30
    pretrain.affine = ConfigDict()  # a small random movement; for images too small for the other
    pretrain.affine.shift = 1.0  # largest, in pixels
    pretrain.affine.degrees = 10.0  # largest rotation
    pretrain.affine.zoom = 0.1  # largest relative change of size

    config.finetune = finetune = ConfigDict()  # DP-SGD on the private images
    finetune.batch_size = 4096  # expected images per step, of all groups; q = 1 / ceil(N / batch_size)
    finetune.epochs = 150.0  # expected uses of each image: steps = epochs / q; may be a fraction
    # In place of epochs: how long all steps together may take here, as '45m', '1.5h' or '90s', without
    # compilation. Their number follows from the speed of this machine on random images, before the noise is
    # calibrated to it, and stays that of the run, wherever it goes on. '' = epochs.
    finetune.time_limit = ''
    finetune.draws = 32  # K, noise draws per image and step
    finetune.clip_norm = 1.0  # C, of the gradient of one image (or of all images of a group together)
    finetune.learning_rate = 3e-4  # of Adam
    finetune.schedule = 'constant'  # of the learning rate: constant | linear | cosine, to 0 after all steps
    # Take the noise, whose size is public, from the mean square that Adam divides by (DP-AdamBC).
    finetune.noise_correction = False
    finetune.ema_decay = 0.999
    finetune.label_dropout = 0.1
    # Private images whose gradients a device holds at once; unset: as loop.images_at_once allows.
    finetune.microbatch = placeholder(int)
    # Devices that share the noise draws of an image, where a batch has fewer images than fill all devices;
    # divides draws, and the devices of each host. Unset: 1, or what is predicted to be faster.
    finetune.devices_per_image = placeholder(int)
    # How many averaged weights on the way are kept, in private/, for release/over_finetuning.png: those
    # before the first step, and after 1/3, 1/9, ... of all; 0 = none. Each takes 4 bytes per parameter.
    finetune.snapshots = 5

    config.generate = generate = ConfigDict()
    generate.images = 60000  # synthetic images
    # Their number per class, at least 2 each: balanced | shares (generate.class_shares) | query (in
    # proportion to the noisy counts that the query released; needs query.class_counts = 'noisy').
    generate.class_counts = 'balanced'
    generate.class_shares = ()  # with shares: a number > 0 for each class; public
    # Share of the images of each class, in [0, 1), that are drawn from the class moments in place of the
    # diffusion model. Needs moments.enabled. In images.npz, `source` is 1 for them. Classifiers gain where
    # generate.images is raised by as many.
    generate.moments_share = 0.0
    generate.batch_size = 500  # images per device at once
    generate.sampler = sampler()  # of the images for FID
    # The paper tunes a second sampler for the images that train the classifiers.
    generate.separate_classifier_images = False
    generate.classifier_sampler = sampler()
    generate.png_tree = (
        False  # also release/synthetic/png/<class name>/<number>.png (torchvision's ImageFolder)
    )
    generate.tfds = False  # also release/synthetic/tfds, which tensorflow-datasets reads
    # Also release/synthetic/dpimagebench/gen/gen.npz, which the evaluation of DPImageBench reads.
    generate.dpimagebench = False

    config.evaluate = evaluate = ConfigDict()  # looks at real images: results stay in private/
    # With --stage=evaluate: an .npz file of images from elsewhere, which are scored as the run's own are. x
    # (N, C, H, W) and y (N,), as DPImageBench writes them, or images (N, H, W, C) and labels (N,); pixels are
    # uint8, or in [0, 1]. That takes no model, spends nothing, and changes nothing of the run: scores and
    # report lie in private/other_images/. '' = the run's own images.
    evaluate.images = ''
    # True: the evaluation of the paper's PyTorch code (docs/from_pytorch.md), so that scores can stand beside
    # published ones. Its classifiers train on all synthetic images, nothing chooses among their epochs, and
    # FID takes Inception's features. Other values of these settings than the paper's are then refused.
    evaluate.as_paper = False
    evaluate.fid = True
    # Whose features FID and the metrics compare: inception (that of the public FID) | cnn (a small one,
    # trained on the private images: quick, but compares only within one data set and seed) | auto (inception,
    # if its weights are there or can be downloaded; else cnn).
    evaluate.features = 'auto'
    # The public PyTorch file of its weights, pt_inception-2015-12-05-6726825d.pth; '' = download it, once.
    evaluate.inception = ''
    evaluate.feature_epochs = 10  # of the small CNN on real images
    # What is computed beside FID (with fid = False: nothing). memorization: whether synthetic images lie
    # nearer to private ones than real test images do.
    evaluate.metrics = ('kid', 'inception_score', 'precision_recall', 'fid_of_class', 'memorization')
    evaluate.classifiers = ('logistic', 'mlp', 'cnn')
    evaluate.epochs = 50  # of the classifiers on synthetic images
    evaluate.batch_size = 64
    evaluate.learning_rate = 3e-4
    evaluate.ema_decay = 0.9999
    evaluate.held_out = 0.1  # selection synthetic: share of the synthetic images that selects the model
    # Also train each classifier on the private images, once: its accuracy is what no generator exceeds.
    evaluate.real_images = True
    # Trainings of each classifier, with keys of their own: scores are their mean, with a spread from 2 on.
    # On the private images there is one; so there is of logistic regression with private_noisy, where nothing
    # of it is random.
    evaluate.seeds = 1
    # What selects among a training's epochs (logistic regression: among strengths of its regularization):
    # synthetic (a held-out share of them) | private_noisy (noisy counts of the private images that each
    # classifies correctly; classifiers then train on all synthetic images, and the noise of fine-tuning
    # pays for it). Never test images. With private_noisy, evaluate.* that decide it are fixed with the plan.
    evaluate.selection = 'synthetic'
    evaluate.selection_share = 0.02  # private_noisy: of ε, that the selection alone may spend, in (0, 1)
    evaluate.candidates = 10  # private_noisy: epochs of a training to select from, at most; equally spaced

    config.loop = loop = ConfigDict()  # changes no result but rounding; may differ between restarts
    # Noised images that pass through the network together on a device; unset: what a CPU's cache
    # holds, and 512 on other devices.
    loop.images_at_once = placeholder(int)
    loop.log_every_steps = 10
    loop.checkpoint_every_seconds = 120.0
    return config


def sampler(name: str = 'heun', steps: int = 1000, **settings: float) -> ConfigDict:
    """Settings of a sampler (EDM, Karras et al. 2022): Heun's by default, deterministic."""
    config = ConfigDict()
    # heun (calls the network twice in a step) | ddim | dpmpp_2m | dpmpp_2m_sde (random)
    config.name = name
    config.steps = steps
    config.guidance = 0.0  # 0 = none
    config.guidance_min = 0.0  # noise levels between which there is guidance
    config.guidance_max = 1000.0
    config.s_churn = 0.0  # heun only, as are the next two
    config.s_min = 0.0
    config.s_max = 50.0
    config.s_noise = 1.0  # heun, dpmpp_2m_sde
    config.t_min = 0.002  # last and first noise level, and the curve between them
    config.t_max = 80.0
    config.rho = 7.0
    config.update(settings)
    return config


def may_use_moments(get_config: Callable[[str], ConfigDict]) -> Callable[[str], ConfigDict]:
    """Let `--config=<name>:<ε>,moments` switch a config to `use_moments`."""

    @functools.wraps(get_config)
    def switched(epsilon: str | None = None) -> ConfigDict:
        if epsilon is None:
            return get_config()
        number, comma, word = epsilon.partition(',')
        if comma and word != 'moments':
            raise ValueError(
                f'after ε, --config has {word!r}; it may be moments, as in mnist_28.py:{number},moments'
            )
        config = get_config(number)
        if comma:
            use_moments(config)
        return config

    return switched


def use_moments(config: ConfigDict) -> None:
    """Ask for class moments, pre-train on them, train around them, and sample in a few steps.

    Network and fine-tuning stay. Shares and norms are those of mnist_14 and mnist_28_hour, the norms with the
    root of the number of values; pre-training has their images, at their rate. On color images, whose pixels
    are centered in the middle, nobody has tried it.
    """
    data = config.data
    average_down = next(
        k for k in range(1, data.image_size + 1) if data.image_size % k == 0 and data.image_size <= 16 * k
    )
    values = data.channels * data.image_size**2
    config.name += '_moments'
    config.query.update(epsilon_share=0.05, sampling_probability=1.0, queries=1, downsample=1)
    config.query.update(clip_norm=0.35 * values**0.5, post_process=False)
    config.query.pixel_center = 0.3 if data.channels == 1 else 0.5
    config.moments.update(enabled=True, epsilon_share=0.2, average_down=average_down, frequencies=100)
    config.moments.clip_norm = 0.18 * values**0.5 / average_down
    config.model.around = 'moments'
    config.pretrain.update(epochs=0, moments_steps=1000, batch_size=64, draws=2, learning_rate=1e-3)
    config.generate.separate_classifier_images = False
    config.generate.sampler = sampler(name='dpmpp_2m', steps=12, guidance=0.2)


def parse_epsilon(text: str) -> float:
    """ε from the part of --config after the colon."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f'ε after the colon of --config is {text!r}; it must be a number, as in mnist_28.py:1'
        ) from None


def is_small(epsilon: float) -> bool:
    """Which of the paper's two settings (ε = 1 or ε = 10) is nearer, on a logarithmic scale."""
    return epsilon < 10**0.5
