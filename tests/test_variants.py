"""A variant taken from a newer opset is the one that raising the model to its own opset makes."""

from __future__ import annotations

import pytest
from planning_case import MODELS, VNNI, measurements, prepared

from lcpaq_onnx.planning.choices import Allowed
from lcpaq_onnx.planning.variants import Variants
from lcpaq_onnx.targets.loader import load as load_target


def variants(name: str) -> Variants:
    return Variants(prepared(name), measurements(name).tensors, load_target(VNNI), Allowed())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("opset", [17, 21])
def test_from_a_newer_opset_or_raised_is_the_same(name: str, opset: int) -> None:
    raised = variants(name).at(opset)
    both = variants(name)
    both.widest()
    found = both.at(opset)
    assert (found.opset, found.ir_version) == (raised.opset, raised.ir_version)
    assert found.costs == raised.costs
    assert found.timeline == raised.timeline
    assert found.structure == raised.structure
    assert found.explicit == raised.explicit
    assert found.sizes.total({}, {}, {}) == raised.sizes.total({}, {}, {})
