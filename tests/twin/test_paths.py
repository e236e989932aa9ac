"""Models whose path or sizes the data decides, and models of which a part cannot be exported: a cut equals its twin."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator.cut import plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import take
from setpoint.groups.example import inputs_of, mapped, tensors_of
from setpoint.groups.group import Group, random_keep
from setpoint.groups.trace import Trace, trace


def widened(value: Any) -> Any:
    """In float64."""
    return mapped(lambda x: x.double() if x.is_floating_point() else x, value)


def check_twin(model: nn.Module, example: Any, inputs: Any = None, *, steps: int = 3) -> Trace:
    """What is found with the example; in float64 a cut at random widths equals the masked twin in outputs and weights,
    over some steps on `inputs`, by default the example.
    """
    tolerance = 1e-10
    with warnings.catch_warnings(action="ignore"):
        found = trace(model, example)
    model, example = model.double(), widened(example if inputs is None else inputs)
    groups = tuple(group for group in found.groups if group.lossless)
    assert groups
    twin, keep = copy.deepcopy(model), random_keep(groups)
    shrink(model, None, groups, keep)
    optimizers = [torch.optim.SGD(each.parameters(), 1e-2) for each in (model, twin)]
    args, kwargs = inputs_of(example)
    for step in range(steps):
        mask(twin, None, groups, keep)
        losses = []
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(step)
            np.random.seed(step)
            outputs = [x for x in tensors_of(each(*args, **kwargs)) if x.is_floating_point() and x.requires_grad]
            loss = sum((x.square().mean() for x in outputs), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
        assert losses[0].isfinite()
    mask(twin, None, groups, keep)
    dims, full = plan_cut(groups, keep).dims(), dict(twin.named_parameters())
    for name, small in model.named_parameters():
        expected = take(full[name], dims.get(name, {}))
        torch.testing.assert_close(small.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    return found


def names(groups: tuple[Group, ...]) -> set[str]:
    return {group.name for group in groups}


def _encoder(causal: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    example = {"src": torch.randn(2, 5, 16), "mask": mask if causal else mask.t().contiguous()}
    return nn.TransformerEncoder(layer, 2), example


def _whole() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    example = {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 4, 16), "tgt_mask": mask}
    return nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True), example


@pytest.mark.parametrize(
    ("build", "cut"),
    [
        (lambda: _encoder(True), "layers.0.self_attn layers.0.linear1 layers.1.self_attn layers.1.linear1"),
        (lambda: _encoder(False), "layers.0.self_attn layers.0.linear1 layers.1.self_attn layers.1.linear1"),
        (_whole, "encoder.layers.0.linear1 decoder.layers.0.linear1 decoder.layers.0.self_attn"),
    ],
    ids=["causal", "other mask", "decoder"],
)
def test_a_transformer_with_a_mask(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], cut: str) -> None:
    """Claim: torch's encoder and decoder, which look at the values of their masks, are cut; heads and hidden widths are
    found.
    """
    torch.manual_seed(0)
    assert names(check_twin(*build()).groups) >= set(cut.split())


LIBRARY = '''
import torch
from torch import nn


class GCNConv(nn.Module):
    """A convolution on a graph, which adds the loops that are missing, as torch_geometric's does."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin, self.bias = nn.Linear(inputs, outputs, bias=False), nn.Parameter(torch.zeros(outputs))

    def forward(self, x, edge_index):
        nodes = x.size(0)
        edge_index = edge_index[:, edge_index[0] != edge_index[1]]
        loops = torch.arange(nodes)
        source, target = torch.cat([edge_index, torch.stack([loops, loops])], 1)
        degree = torch.zeros(nodes, dtype=x.dtype).scatter_add_(0, target, torch.ones(len(target), dtype=x.dtype))
        norm = degree.pow(-0.5)
        x = self.lin(x)
        message = x.index_select(0, source) * (norm[source] * norm[target]).unsqueeze(1)
        index = target.unsqueeze(1).expand_as(message)
        return torch.zeros_like(x).scatter_add_(0, index, message) + self.bias


class SkipsLayers(nn.Module):
    """Layers that are skipped at random, as wav2vec2's."""

    def __init__(self, width, hidden, share):
        super().__init__()
        self.share = share
        self.ups = nn.ModuleList(nn.Linear(width, hidden) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(hidden, width) for _ in range(3))

    def forward(self, x):
        for up, down in zip(self.ups, self.downs):
            if not (self.training and torch.rand([]) < self.share):
                x = x + down(up(x).relu())
        return x


class Storage(dict):
    pass


class Data:
    """A graph, as torch_geometric's: tensors in the storage of an object."""

    def __init__(self, **tensors):
        self.__dict__["_store"] = Storage(tensors)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_store"][name]
'''


class Swish(torch.autograd.Function):
    """x * sigmoid(x) that keeps its input alone, as EfficientNets outside of torchvision have it."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(context.saved_tensors[0])
        return gradient * (sigmoid * (1 + context.saved_tensors[0] * (1 - sigmoid)))


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze-excite, projection, and a skip where it fits."""

    def __init__(self, inputs: int, outputs: int, swish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        hidden, self.swish, self.skip = 4 * inputs, swish, inputs == outputs
        self.expand, self.norm0 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm1, self.reduce, self.widen = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, 12, 1), nn.Conv2d(12, hidden, 1)
        self.project, self.norm2 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.swish(self.norm0(self.expand(inputs)))
        x = self.swish(self.norm1(self.depthwise(x)))
        x = torch.sigmoid(self.widen(self.swish(self.reduce(x.mean((2, 3), keepdim=True))))) * x
        x = self.norm2(self.project(x))
        return x + inputs if self.skip else x


def test_an_activation_with_a_backward_of_its_own() -> None:
    """An EfficientNet with a memory-efficient swish has the groups that it has with SiLU, and is cut exactly."""

    def efficientnet(swish: Callable[[Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        blocks = [MBConv(8, 12, swish), MBConv(12, 12, swish), MBConv(12, 16, swish)]
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)
        ).eval()

    example = (torch.randn(4, 3, 10, 10),)
    found, plain = check_twin(efficientnet(Swish.apply), example), trace(efficientnet(nn.functional.silu), example)

    def places(groups: tuple[Group, ...]) -> list[Any]:
        lying = [[(place.tensor, place.dim, place.role, place.index.tolist()) for place in g.slices] for g in groups]
        return [(g.name, g.num_units, g.lossless, *own) for g, own in zip(groups, lying, strict=True)]

    assert places(found.groups) == places(plain.groups)
    assert found.contractions == plain.contractions


@contextmanager
def _installed(folder: Path) -> Iterator[ModuleType]:
    """A module in a folder of installed packages."""
    file = folder / "site-packages" / "graphs.py"
    file.parent.mkdir()
    file.write_text(LIBRARY, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("graphs", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "graphs", module)
        spec.loader.exec_module(module)
        yield module


class GraphNet(nn.Module):
    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.a, self.b = conv(8, 16), conv(16, 3)

    def forward(self, data: Any) -> Tensor:
        out: Tensor = self.b(self.a(data.x, data.edge_index).relu(), data.edge_index)
        return out


def graph() -> dict[str, Tensor]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 2]])
    return {"x": torch.randn(6, 8), "edge_index": edges}


def test_a_network_on_graphs(tmp_path: Path) -> None:
    """Claim: layers whose number of edges the data decides, on an object that holds a graph, are cut; the loop meets
    its budget on graphs of other sizes, with the object as example or without one.
    """
    torch.manual_seed(0)
    with _installed(tmp_path) as graphs:
        found = check_twin(GraphNet(graphs.GCNConv), (graphs.Data(**graph()),))
        assert names(found.groups) == {"a.lin"}
        model = GraphNet(graphs.GCNConv)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        loop = setpoint.attach(model, optimizer, 0.5, total_steps=20)
        for step in range(20):
            given = graph()
            given["edge_index"] = given["edge_index"][:, : 8 - step % 3]
            model(graphs.Data(**given)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loop.finish().budget_met


def test_layers_that_are_skipped_at_random(tmp_path: Path) -> None:
    """Claim: no layer is taken for absent because it was skipped at random; all are cut, whatever is skipped later."""
    torch.manual_seed(0)
    with _installed(tmp_path) as graphs:
        model = nn.Sequential(graphs.SkipsLayers(8, 16, 0.9), nn.Linear(8, 2))
        example = (torch.randn(4, 8),)
        state = torch.get_rng_state()
        trace(model, example)
        assert torch.equal(torch.get_rng_state(), state)
        found = check_twin(model, example, steps=6)
        assert names(found.groups) == {"0.ups.0", "0.ups.1", "0.ups.2"} and not found.unreached


def wav2vec2() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
    off = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout")
    config = transformers.Wav2Vec2Config(
        **sizes, **dict.fromkeys(off, 0.0), conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 4),
        num_conv_pos_embedding_groups=2, layerdrop=0.5, mask_time_length=2, ctc_loss_reduction="mean",
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config).train()
    return model, {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 12, (2, 5))}


def detr() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _DETR.items()}
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        num_queries=4, num_labels=3, dropout=0.0, **sizes,
    )  # fmt: skip
    model = transformers.DetrForObjectDetection(config).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    return model, {"pixel_values": torch.randn(1, 3, 32, 32), "labels": labels}


_DETR = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


@pytest.mark.parametrize(
    ("build", "cut"),
    [
        (wav2vec2, {f"encoder.layers.{n}.feed_forward.intermediate_dense" for n in range(2)}),
        (detr, {"encoder.layers.0.mlp.fc1", "decoder.layers.0.mlp.fc1"}),
    ],
    ids=["wav2vec2 with labels", "detr with labels"],
)  # fmt: skip
def test_a_loss_that_cannot_be_exported(build: Callable[[], tuple[nn.Module, dict[str, Any]]], cut: set[str]) -> None:
    """Claim: a model that works out a loss no graph can hold (CTC, a matching) is cut in its parts, and it is named."""
    model, example = build()
    found = check_twin(model, example, {name: x for name, x in example.items() if name != "labels"})
    assert len([name for name in names(found.groups) if name.partition(".")[2] in cut]) == len(cut)
    assert any(each.place == "model" and "cannot be exported" in each.reason for each in found.frozen)


def faster_rcnn() -> tuple[nn.Module, tuple[Any, ...]]:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
    backbone.out_channels = 16  # type: ignore[assignment]
    model = detection.FasterRCNN(
        backbone, min_size=32, max_size=32, rpn_pre_nms_top_n_train=20, rpn_post_nms_top_n_train=8,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((16,),), ((1.0,),)),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 49, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 3),
    )  # fmt: skip
    targets = [{"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}]
    return model.train(), ([torch.rand(3, 32, 32)], targets)


def test_a_detector() -> None:
    """Claim: Faster R-CNN, whose proposals the data decides, is cut in its backbone and its heads."""
    model, example = faster_rcnn()
    found = check_twin(model, example)
    assert names(found.groups) == {
        "backbone.0",
        "rpn.head.conv.0.0",
        "roi_heads.box_head.fc6",
        "roi_heads.box_head.fc7",
    }


def test_a_detector_in_training() -> None:
    """Claim: without an example, with boxes that differ from step to step, it meets its budget, and detects."""
    model, (images, _) = faster_rcnn()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loop = setpoint.attach(model, optimizer, 0.7, total_steps=12)
    for step in range(12):
        boxes = torch.tensor([[2.0, 2, 20, 20], [5, 5, 15 + step, 30]])[: 1 + step % 2]
        given = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}
        sum(model(images, [given]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met
    assert "boxes" in model.eval()(images)[0]
