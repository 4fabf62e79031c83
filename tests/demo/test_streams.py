import pytest
import torch

pytest.importorskip("sklearn")

from shiftkern.demo import digits
from shiftkern.demo.streams import CORRUPTIONS, SEVERITIES, continual_stream, corrupt, make_streams


@pytest.fixture(scope="module")
def images():
    return torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SEVERITIES)
def test_a_higher_severity_moves_images_further(kind, images):
    moved = [(corrupt(images, kind, severity, seed=0) - images).square().mean().item() for severity in range(1, 6)]
    assert moved[0] > 0
    assert moved == sorted(moved)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_keeps_shape_and_input_and_repeats(kind, images):
    before = images.clone()
    first, second = corrupt(images, kind, 3, seed=5), corrupt(images, kind, 3, seed=5)
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_noise_depends_on_the_seed_and_has_the_stated_spread():
    zeros = torch.zeros(200, 1, 16, 16)
    noisy = corrupt(zeros, "noise", 3, seed=1)
    assert not torch.equal(noisy, corrupt(zeros, "noise", 3, seed=2))
    assert noisy.std().item() == pytest.approx(SEVERITIES["noise"][2], rel=0.02)


def test_contrast_keeps_the_mean_and_scales_the_spread(images):
    low = corrupt(images, "contrast", 5, seed=0)
    torch.testing.assert_close(low.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(low.std((1, 2, 3)), SEVERITIES["contrast"][4] * images.std((1, 2, 3)))


def test_blur_leaves_a_flat_image_alone():
    flat = torch.full((2, 1, 16, 16), 0.3)
    torch.testing.assert_close(corrupt(flat, "blur", 5, seed=0), flat)


def test_rotation_turns_by_the_stated_angle():
    # A bright pixel block right of the centre, at distance 5: its centre of mass must turn by the angle.
    image = torch.zeros(1, 1, 16, 16)
    image[..., 7:9, 12:14] = 1
    turned = corrupt(image, "rotation", 4, seed=0)[0, 0]
    axis = torch.arange(16) - 7.5
    y, x = (turned.sum(1) * axis).sum() / turned.sum(), (turned.sum(0) * axis).sum() / turned.sum()
    angle = torch.rad2deg(torch.atan2(y, x)).abs().item()
    assert angle == pytest.approx(SEVERITIES["rotation"][3], abs=2)


@pytest.mark.parametrize(("kind", "severity"), [("fog", 3), ("noise", 0), ("noise", 6)])
def test_unknown_corruption_or_severity_is_an_error(kind, severity, images):
    with pytest.raises(ValueError, match="corrupt: argument"):
        corrupt(images, kind, severity, seed=0)


def test_both_orders_hold_the_same_images(images):
    labels = torch.arange(12) % 3
    streams = {stream.name: stream for stream in make_streams(images, labels, 3, seed=0)}
    assert list(streams) == [f"{kind}/{order}" for order in ("iid", "sorted") for kind in CORRUPTIONS]
    iid, in_order = streams["noise/iid"], streams["noise/sorted"]
    assert in_order.labels.tolist() == sorted(labels.tolist())
    key = torch.argsort(iid.labels, stable=True)
    assert torch.equal(in_order.images, iid.images[key])


def test_batches_of_the_continual_stream_do_not_span_segments(images):
    stream = continual_stream(images, torch.arange(12), 3, seed=0)
    sizes = [len(labels) for _, labels in stream.batches(8)]
    assert sizes == [8, 4] * len(stream.segments)
    assert stream.segments[0][0] == stream.segments[-1][0] == "clean"
    assert torch.equal(torch.cat([x for x, _ in stream.batches(5)]), stream.images)


def test_digits_are_split_without_overlap_and_by_seed():
    data, other = digits.load(0), digits.load(1)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.test_images.shape[1:] == (1, 16, 16)
    assert data.test_images.min() >= 0
    assert data.test_images.max() <= 1
    train = {image.numpy().tobytes() for image in data.train_images}
    # The data set itself may hold equal images; the split may not hold the same sample twice.
    assert sum(image.numpy().tobytes() in train for image in data.test_images) < 5
    assert not torch.equal(data.test_images, other.test_images)


def test_network_and_training_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    data = digits.load(0)
    network = digits.build_network(0)
    digits.train(network, data.train_images[:128], data.train_labels[:128], seed=0, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not network.training
