"""Options of flow matching: each is off by default, and does what its paper says when on."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flows.bases import Inpainting, SuperResolution
from flows.batch import Batch
from flows.couplings import Coupling
from flows.errors import UserError
from flows.objectives.boundary import Boundary
from flows.objectives.flow_matching import FlowMatching
from flows.objectives.losses import compare, misalignment
from flows.paths import LINEAR, PATHS, linear, path_named
from flows.randomness import Draw
from flows.times import TimeDistribution

SEED, STEP, CLASSES = 11, 3, 4
UNIFORM = TimeDistribution("uniform", 0.0, 1.0, 1.0)
WHOLE = 24


def objective(**options) -> FlowMatching:
    given = {"path": LINEAR, "prediction": "velocity", "weighting": "none", "label_drop": 0.0}
    return FlowMatching(**(given | {"null_label": CLASSES, "time": UNIFORM} | options))


def batch(size=WHOLE, shape=(2, 4, 4), seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, *shape, generator=generator)
    label = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(image, label, torch.arange(size) + WHOLE * STEP)


def prepared(chosen, samples):
    return chosen.prepare(samples, Draw(SEED, STEP, samples.position))


def coupled(chosen, samples, whole=None):
    return chosen.couple(samples, whole or samples, SEED, STEP)


def own_noise(samples):
    return Draw(SEED, STEP, samples.position).normal("noise", tuple(samples.image.shape[1:]))


def test_nothing_is_coupled_by_default():
    assert objective().couple is None
    for coupling in (Coupling("assignment", 1.0, 0), Coupling("weighted", 1.0, 0)):
        assert objective(coupling=coupling).couple is not None
    assert objective(contrast=0.05).couple is not None


@pytest.mark.parametrize("kind", ["assignment", "entropic", "stable", "weighted"])
@pytest.mark.parametrize("contrast", [0.0, 0.05])
def test_a_sample_is_coupled_alike_wherever_it_lies(kind, contrast):
    """Cut into parts of any size and order, each sample keeps its noise, weight and negative."""
    whole = batch()
    chosen = objective(coupling=Coupling(kind, 20.0, 0), contrast=contrast, label_drop=0.3)
    expected = coupled(chosen, whole).extras
    for rows in (torch.arange(7), torch.tensor([20, 3, 11]), torch.arange(23, -1, -1)):
        found = coupled(chosen, whole.take(rows), whole).extras
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name][rows]), name


def test_coupled_noise_is_where_paths_begin():
    samples = batch()
    chosen = objective(coupling=Coupling("assignment", 1.0, 0))
    joined = coupled(chosen, samples)
    ready = prepared(chosen, joined)
    point = LINEAR.interpolate(samples.image, joined.extras["noise"], ready.time)
    assert torch.equal(ready.inputs["x"], point.x)
    assert torch.equal(ready.targets["prediction"], point.velocity)
    assert torch.equal(ready.inputs["label"], samples.label)  # the label stays with the image
    assert not torch.equal(joined.extras["noise"], own_noise(samples))


def test_noise_of_the_data_is_kept_or_the_coupling_refused():
    """Pairs of a reflow lie beside the images."""
    samples = batch()
    pairs = replace(samples, extras={"noise": torch.zeros_like(samples.image)})
    ready = prepared(objective(), pairs)
    assert torch.equal(ready.targets["prediction"], samples.image)
    with pytest.raises(UserError, match="joins each image to its own noise"):
        coupled(objective(contrast=0.1), pairs)


def test_weights_of_a_large_epsilon_change_no_gradient():
    samples = batch()
    chosen = objective(coupling=Coupling("weighted", 1e12, 0))
    weighted, plain = prepared(chosen, coupled(chosen, samples)), prepared(objective(), samples)
    outputs = torch.zeros_like(samples.image)
    ours, theirs = chosen.loss(outputs, weighted.targets), objective().loss(outputs, plain.targets)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    near = objective(coupling=Coupling("weighted", 10.0, 0))
    loss = near.loss(outputs, prepared(near, coupled(near, samples)).targets)
    distance = (samples.image - own_noise(samples)).square().flatten(1).sum(1)
    expected = WHOLE * torch.softmax(-distance.double() / 10, 0)
    assert torch.allclose(loss.double(), theirs.double() * expected, rtol=1e-5)


def test_a_bridge_strays_and_comes_back():
    samples = batch()
    straight, bridged = prepared(objective(), samples), prepared(objective(bridge=0.5), samples)
    t = bridged.time
    assert t.min() >= 1e-3
    assert t.max() <= 1 - 1e-3
    mean = LINEAR.interpolate(samples.image, own_noise(samples), t)
    z = (bridged.inputs["x"] - mean.x) / (0.5 * (t * (1 - t)).sqrt())[:, None, None, None]
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert z.var().item() == pytest.approx(1, abs=4 * (2 / z.numel()) ** 0.5)
    pull = (1 - 2 * t) / (2 * t * (1 - t))
    expected = mean.velocity + pull[:, None, None, None] * (bridged.inputs["x"] - mean.x)
    assert torch.allclose(bridged.targets["prediction"], expected, rtol=1e-3, atol=1e-3)
    small = prepared(objective(bridge=1e-9), samples)
    assert torch.allclose(small.inputs["x"], mean.x, atol=1e-6)
    assert torch.allclose(straight.time, t, atol=2e-3)


def test_without_contrast_the_loss_is_flow_matching():
    samples = batch()
    chosen = objective(contrast=1e-30)
    outputs = torch.randn(samples.image.shape, generator=torch.Generator().manual_seed(1))
    ours = chosen.loss(outputs, prepared(chosen, coupled(chosen, samples)).targets)
    theirs = objective().loss(outputs, prepared(objective(), samples).targets)
    assert torch.equal(ours, theirs)


def test_negatives_are_targets_of_other_classes():
    samples = batch()
    for path in PATHS.values():
        chosen = objective(path=path, contrast=0.05)
        joined = coupled(chosen, samples)
        ready = prepared(chosen, joined)
        noise = own_noise(samples)
        image = joined.extras["negative_image"]
        index = [int((samples.image == one).flatten(1).all(1).nonzero()) for one in image]
        assert (samples.label[index] != samples.label).all()
        assert torch.equal(joined.extras["negative_noise"], noise[index])
        target = path.interpolate(image, noise[index], ready.time).velocity
        assert torch.equal(ready.targets["negative"], target)
        v = torch.full_like(image, 0.3)
        positive, apart = ((v - u).square().flatten(1).mean(1) for u in
                           (ready.targets["prediction"], target))  # fmt: skip
        expected = positive - 0.05 * apart
        assert torch.allclose(chosen.loss(v, ready.targets), expected, rtol=1e-5)


def test_hidden_labels_are_not_contrasted_and_the_rest_weighs_more():
    samples = batch()
    chosen = objective(contrast=0.05, label_drop=0.4)
    joined = coupled(chosen, samples)
    hidden = prepared(chosen, joined).inputs["label"] == CLASSES
    assert 0 < hidden.sum() < WHOLE
    weight = joined.extras["negative_weight"]
    assert (weight[hidden] == 0).all()
    # By the share that is hidden in the mean, not in this batch: no push outweighs the loss by chance.
    assert torch.allclose(weight[~hidden], torch.tensor(0.05 / (1 - 0.4)))
    most = objective(contrast=0.59, label_drop=0.4)
    assert coupled(most, samples).extras["negative_weight"].max() < 1


def test_the_minimum_of_the_contrastive_loss():
    """(v* - lambda E u') / (1 - lambda), of the loss over all pairs of two classes, at one place.

    Both classes are atoms, so that v* is the mean target of the class and E u' that of the other.
    """
    lam, own, other = 0.2, torch.tensor([1.5, -0.5]), torch.tensor([-1.0, 2.0])
    chosen = objective(contrast=lam)

    def loss(v):
        v = v.reshape(1, 2, 1, 1).double()
        targets = {"prediction": own.reshape(1, 2, 1, 1), "negative": other.reshape(1, 2, 1, 1)}
        weights = {"weight": torch.ones(1), "negative_weight": torch.full((1,), lam)}
        return chosen.loss(v, targets | weights)

    best = (own - lam * other) / (1 - lam)
    point = best.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point).sum(), point)
    assert gradient.abs().max() < 1e-6
    assert loss(best + 0.01) > loss(best)


def test_loss_shapes():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    error, d = prediction - target, 48
    squared = error.square().flatten(1).mean(1)
    assert torch.allclose(compare("squared", prediction, target), squared)
    c = 0.00054 * d
    huber = (torch.sqrt(error.square().flatten(1).sum(1) + c**2) - c) / d
    assert torch.allclose(compare("pseudo_huber", prediction, target), huber, rtol=1e-12)
    cosine = 1 - F.cosine_similarity(prediction, target, dim=1).mean((1, 2))
    assert torch.allclose(compare("squared_cosine", prediction, target), squared + cosine)
    assert compare("squared_cosine", target, target).abs().max() < 1e-12
    assert compare("pseudo_huber", target, target).max() == 0


def test_a_small_huber_error_is_squared_and_a_large_one_is_not():
    target, d = torch.zeros(1, 1, 4, 4, dtype=torch.float64), 16
    c = 0.00054 * d
    for size in (1e-7, 1e3):
        error = torch.full_like(target, size)
        length = size * math.sqrt(d)
        expected = length**2 / (2 * c) / d if size < c else length / d
        assert compare("pseudo_huber", error, target).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", ["squared", "pseudo_huber", "squared_cosine"])
def test_an_objective_compares_as_it_is_told(shape):
    samples = batch()
    chosen = objective(shape=shape)
    ready = prepared(chosen, samples)
    outputs = torch.randn(samples.image.shape, generator=torch.Generator().manual_seed(1))
    expected = compare(shape, outputs, ready.targets["prediction"])
    assert torch.equal(chosen.loss(outputs, ready.targets), expected)
    assert chosen.loss(outputs.bfloat16(), ready.targets).dtype == torch.float32


@pytest.mark.parametrize("power", [1.5, 2.0, 8.0])
def test_boundary_conditions_are_exact(power):
    """|v(x, 1) - x| = 0 and |v(x, 0) + x - E x1| = 0 whatever the network says."""
    generator = torch.Generator().manual_seed(0)
    x, outputs = torch.randn(2, 6, 3, 4, 4, generator=generator) * 10
    mean = torch.tensor([0.3, -0.2, 5.0]).reshape(1, 3, 1, 1)
    both, data = Boundary(power, (0.3, -0.2, 5.0)), Boundary(power, None)
    for boundary in (both, data):
        assert torch.equal(boundary(outputs, x, torch.ones(6)), x)
        assert torch.equal(boundary(outputs, x, torch.tensor(1.0)), x)
    assert torch.equal(both(outputs, x, torch.zeros(6)), mean - x)
    assert torch.equal(data(outputs, x, torch.zeros(6)), outputs)
    middle = both(outputs, x, torch.full((6,), 0.5))
    share = 0.5**power
    assert torch.allclose(middle, share * mean + (1 - 2 * share) * outputs, atol=1e-5)


def test_the_boundary_is_in_the_loss_and_in_the_velocity():
    samples = batch()
    chosen = objective(boundary=Boundary(2.0, (0.0, 0.0)))
    ready = prepared(chosen, samples)
    outputs = torch.randn(samples.image.shape, generator=torch.Generator().manual_seed(1))
    velocity = chosen.velocity(outputs, ready.inputs["x"], ready.time)
    expected = (velocity - ready.targets["prediction"]).square().flatten(1).mean(1)
    assert torch.allclose(chosen.loss(outputs, ready.targets), expected, rtol=1e-6)
    one = chosen.velocity(outputs, ready.inputs["x"], torch.ones(WHOLE))
    assert torch.equal(one, ready.inputs["x"])


def test_alignment_is_the_mean_cosine_of_tokens():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(WHOLE, 5, 7, generator=generator)
    samples = replace(batch(), extras={"features": features})
    chosen = objective(alignment=0.5)
    ready = prepared(chosen, samples)
    prediction = ready.targets["prediction"]
    assert torch.allclose(
        chosen.loss((prediction, 3 * features), ready.targets), torch.tensor(-0.5)
    )
    assert torch.allclose(chosen.loss((prediction, -features), ready.targets), torch.tensor(0.5))
    other = torch.randn(WHOLE, 5, 7, generator=generator)
    cosine = F.cosine_similarity(other.double(), features.double(), dim=-1).mean(1)
    assert torch.allclose(misalignment(other, features).double(), -cosine, atol=1e-6)
    x, t = ready.inputs["x"], ready.time
    assert torch.equal(chosen.velocity((prediction, other), x, t), prediction)
    with pytest.raises(UserError, match="needs a model that projects"):
        chosen.loss(prediction, ready.targets)
    with pytest.raises(UserError, match="features beside each image"):
        prepared(chosen, batch())


def test_text_and_label_are_hidden_together():
    samples = batch(4000, shape=(1, 1, 1))
    text = torch.ones(4000, 3, 2)
    ready = prepared(objective(label_drop=0.3), replace(samples, extras={"text": text}))
    hidden = ready.inputs["label"] == CLASSES
    assert 0.25 < hidden.double().mean() < 0.35
    assert (ready.inputs["text"][hidden] == 0).all()
    assert (ready.inputs["text"][~hidden] == 1).all()


def test_in_painting_moves_nothing_that_is_seen():
    samples = batch(shape=(2, 10, 8))
    base = Inpainting(tile=4, seen=0.5)
    ready = prepared(objective(base=base), samples)
    draw = Draw(SEED, STEP, samples.position)
    seen = base.mask(samples.image, draw)
    assert seen.shape == (WHOLE, 1, 10, 8)
    for row in (0, 4, 8):
        for column in (0, 4):
            tile = seen[:, 0, row : row + 4, column : column + 4].flatten(1)
            assert (tile == tile[:, :1]).all()
    assert 0.3 < seen.double().mean() < 0.7
    seen = seen.expand_as(samples.image)
    assert (ready.targets["prediction"][seen] == 0).all()
    assert torch.allclose(ready.inputs["x"][seen], samples.image[seen], rtol=1e-6)
    ordinary = prepared(objective(), samples)
    for name in ("x",):
        assert torch.equal(ready.inputs[name][~seen], ordinary.inputs[name][~seen])
    assert torch.equal(ready.targets["prediction"][~seen], ordinary.targets["prediction"][~seen])


def test_super_resolution_begins_at_the_coarse_image():
    samples = batch(shape=(2, 8, 8))
    base = SuperResolution(factor=2, noise=0.1)
    start = base(samples.image, Draw(SEED, STEP, samples.position))
    coarse = F.interpolate(F.avg_pool2d(samples.image, 2), scale_factor=2)
    assert torch.equal(base.coarse(samples.image), coarse)
    assert torch.allclose(start, coarse + 0.1 * own_noise(samples))
    ready = prepared(objective(base=base), samples)
    assert torch.allclose(ready.targets["prediction"], samples.image - start, atol=1e-6)
    constant = torch.full((2, 1, 8, 8), 0.7)
    assert torch.allclose(base.coarse(constant), constant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bridge": 0.5, "path": path_named("gvp")},
            "objective.bridge is for velocities on the linear",
        ),
        ({"boundary": Boundary(2.0, None), "prediction": "data"}, "objective.boundary is for"),
        ({"base": Inpainting(2, 0.5), "path": path_named("vp")}, "objective.base is for"),
        ({"base": Inpainting(2, 0.5), "contrast": 0.1}, "drop objective.base or the others"),
        ({"contrast": 0.1, "shape": "pseudo_huber"}, "set objective.loss=squared"),
        ({"contrast": 0.6, "label_drop": 0.4}, "objective.contrast = 0.6 is not below .* = 0.6"),
        ({"weighting": "velocity", "shape": "squared_cosine"}, "set .*objective.weighting=none"),
        ({"base": Inpainting(2, 0.5), "path": linear(0.5)}, "set objective.sigma_min=0"),
        (
            {"boundary": Boundary(2.0, None), "bridge": 0.3, "path": linear(0.5)},
            "set objective.sigma_min=0",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        objective(**options)
