import pytest
import torch
from hypothesis import given, settings

from shiftkern import ArgumentError, norm, ot
from shiftkern.peft import OFTConfig
from shiftkern.testing import (
    assert_marginals,
    assert_merge_roundtrip,
    assert_same_bits,
    assert_streaming_equals_pooled,
    tensors,
)

from field_station import sensors


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sensors.train(sensors.network(), *sensors.images(128, 0))


def test_statistics_of_the_stream_win_back_what_a_shift_costs(model):
    x, labels = sensors.images(128, 1, shift=-2.0, gain=0.3)
    before = sensors.accuracy(model, x, labels)
    method = sensors.in_the_field(model, list(x.split(32)))
    after = float((method(x).argmax(1) == labels).float().mean())
    assert after > max(before + 0.2, 0.9)
    assert sensors.accuracy(method.unwrap(), x, labels) == before


def test_statistics_may_come_in_parts():
    x, _ = sensors.images(50, 2, shift=2.0)
    assert_streaming_equals_pooled(sensors.statistics, x.split(7))
    assert_same_bits(lambda: sensors.statistics([x]))


@settings(max_examples=20, deadline=None)
@given(tensors(empty=False, min_dim=4, max_dim=4))
def test_statistics_of_any_tensor_are_torchs(x):
    found = sensors.statistics([x])
    torch.testing.assert_close(found.mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_drift_shows(model):
    (one, _), (two, _), (far, _) = (sensors.images(64, s, shift) for s, shift in ((0, 0.0), (1, 0.0), (2, 1.0)))
    with torch.no_grad():
        outputs = [model(x) for x in (one, two, far)]
    assert sensors.drift(outputs[0], outputs[2]) > 2 * sensors.drift(outputs[0], outputs[1])
    assert_marginals(sensors.plan(outputs[0], outputs[2]), None, None)


def test_a_station_adapts_by_rotations(model):
    config = OFTConfig(block_size=4, target_modules=["5"])
    assert_merge_roundtrip(model, config, sensors.images(8, 3)[0])


def test_layers_convert_there_and_back(model):
    x, _ = sensors.images(16, 4)
    with torch.no_grad():
        before = model(x)
        norm.convert_norm(model, "alpha", source_weight=0.5)
        assert not torch.equal(model(x), before)
        norm.revert_norm(model)
        assert torch.equal(model(x), before)


def test_mistakes_are_named():
    with pytest.raises(ArgumentError, match=r"^sinkhorn: argument 'reg': expected a number > 0, got "):
        ot.sinkhorn(None, None, torch.rand(3, 3), reg=0.0)
