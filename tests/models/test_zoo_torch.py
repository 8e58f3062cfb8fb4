"""The networks of the zoo against PyTorch: the same tensors in modules written here give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeward_models import zoo
from edgeward_runtime.sessions import open_exact

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional
torch.set_num_threads(1)  # threads that wait for one another take several times as long on a busy machine

Tensors = dict[str, np.ndarray[Any, Any]]


def built(name: str, out: Path) -> tuple[Path, Tensors]:
    """The random network, and its state dict."""
    recipe, graphs = zoo.recipe(name), zoo.recipe("graphs")
    parameters = graphs.Seeded()
    path = out / f"{name}.onnx"
    graphs.save(recipe.network(graphs.Graph(name, parameters), "for a test"), path)
    return path, parameters.tensors


def answer(path: Path, feeds: Tensors) -> np.ndarray[Any, Any]:
    session = open_exact(path)
    [found] = session.run(feeds)
    session.close()
    return found


def load(module: Any, tensors: Tensors) -> Any:
    """All of the tensors into all of the module's places, and evaluation mode."""
    state = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return module.eval()


# --- ResNet-50


class Bottleneck(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or given != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(given, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Any) -> Any:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class ResNet(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        given = 64
        for k, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            blocks = [Bottleneck(given, width, 2 if k else 1)]
            blocks += [Bottleneck(4 * width, width, 1) for _ in range(count - 1)]
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
            given = 4 * width
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Any) -> Any:
        x = functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def test_resnet50_is_torchs(tmp_path: Path) -> None:
    path, tensors = built("resnet50", tmp_path)
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        expected = load(ResNet(), tensors)(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(answer(path, {"image": image}), expected, atol=2e-3)


# --- YOLOv8-s


class Conv(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, given: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Any) -> Any:
        return functional.silu(self.bn(self.conv(x)))


class Pair(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(width, width, 3), Conv(width, width, 3), shortcut

    def forward(self, x: Any) -> Any:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, given: int, out: int, count: int, shortcut: bool = False) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(given, out), Conv((2 + count) * out // 2, out)
        self.m = nn.ModuleList(Pair(out // 2, shortcut) for _ in range(count))

    def forward(self, x: Any) -> Any:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Pooled(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(512, 256), Conv(1024, 512)

    def forward(self, x: Any) -> Any:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(functional.max_pool2d(parts[-1], 5, 1, 2))
        return self.cv2(torch.cat(parts, 1))


class Detect(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()

        def branch(given: int, width: int, out: int) -> Any:
            return nn.Sequential(Conv(given, width, 3), Conv(width, width, 3), nn.Conv2d(width, out, 1))

        self.cv2 = nn.ModuleList(branch(given, 64, 64) for given in (128, 256, 512))
        self.cv3 = nn.ModuleList(branch(given, 128, 80) for given in (128, 256, 512))
        self.dfl = nn.ModuleDict({"conv": nn.Conv2d(16, 1, 1, bias=False)})

    def forward(self, levels: Any) -> Any:
        boxes, scores, centres, strides = [], [], [], []
        for k, x in enumerate(levels):
            rows, columns = x.shape[2:]
            boxes.append(self.cv2[k](x).flatten(2))
            scores.append(self.cv3[k](x).flatten(2))
            down, across = torch.meshgrid(
                torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij"
            )
            centres.append(torch.stack([across.flatten(), down.flatten()]))
            strides.append(torch.full((rows * columns,), 8.0 * 2**k))
        bins = torch.arange(16.0)
        distances = (torch.cat(boxes, 2).unflatten(1, (4, 16)).softmax(2) * bins[:, None]).sum(2)
        low, high = torch.cat(centres, 1) - distances[:, :2], torch.cat(centres, 1) + distances[:, 2:]
        placed = torch.cat([(low + high) / 2, high - low], 1) * torch.cat(strides)
        return torch.cat([placed, torch.cat(scores, 2).sigmoid()], 1)


class Yolo(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        nothing = nn.Identity
        self.model = nn.ModuleList(
            [
                *(Conv(3, 32, 3, 2), Conv(32, 64, 3, 2), C2f(64, 64, 1, True)),
                *(Conv(64, 128, 3, 2), C2f(128, 128, 2, True), Conv(128, 256, 3, 2), C2f(256, 256, 2, True)),
                *(Conv(256, 512, 3, 2), C2f(512, 512, 1, True), Pooled()),
                *(nothing(), nothing(), C2f(768, 256, 1), nothing(), nothing(), C2f(384, 128, 1)),
                *(Conv(128, 128, 3, 2), nothing(), C2f(384, 256, 1)),
                *(Conv(256, 256, 3, 2), nothing(), C2f(768, 512, 1), Detect()),
            ]
        )

    def forward(self, x: Any) -> Any:
        m, kept = self.model, {}
        for k in range(10):
            kept[k] = x = m[k](x)
        up = {"scale_factor": 2, "mode": "nearest"}
        kept[12] = m[12](torch.cat([functional.interpolate(x, **up), kept[6]], 1))
        kept[15] = m[15](torch.cat([functional.interpolate(kept[12], **up), kept[4]], 1))
        kept[18] = m[18](torch.cat([m[16](kept[15]), kept[12]], 1))
        kept[21] = m[21](torch.cat([m[19](kept[18]), kept[9]], 1))
        return m[22]([kept[15], kept[18], kept[21]])


def test_yolov8s_is_torchs(tmp_path: Path) -> None:
    path, tensors = built("yolov8s", tmp_path)
    pictures = zoo.recipe("graphs").photographs(160)[:1]
    images = np.tile(pictures, (1, 1, 4, 4)).astype(np.float32)
    with torch.no_grad():
        expected = load(Yolo(), tensors)(torch.from_numpy(images)).numpy()
    found = answer(path, {"images": images})
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=0.05)  # pixels
    np.testing.assert_allclose(found[:, 4:], expected[:, 4:], atol=1e-3)


# --- DistilHuBERT


def linear(tensors: Tensors, at: str, x: Any) -> Any:
    weight, bias = (torch.from_numpy(tensors[f"{at}.{part}"]) for part in ("weight", "bias"))
    return functional.linear(x, weight, bias)


def layer_norm(tensors: Tensors, at: str, x: Any) -> Any:
    weight, bias = (torch.from_numpy(tensors[f"{at}.{part}"]) for part in ("weight", "bias"))
    return functional.layer_norm(x, (768,), weight, bias)


def transformer(tensors: Tensors, at: str, x: Any) -> Any:
    """By PyTorch's own encoder layer, whose names differ."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    parts = ("q_proj", "k_proj", "v_proj")
    state = {
        "self_attn.in_proj_weight": np.concatenate([tensors[f"{at}.attention.{p}.weight"] for p in parts]),
        "self_attn.in_proj_bias": np.concatenate([tensors[f"{at}.attention.{p}.bias"] for p in parts]),
    }
    for mine, theirs in (
        ("self_attn.out_proj", "attention.out_proj"),
        ("linear1", "feed_forward.intermediate_dense"),
        ("linear2", "feed_forward.output_dense"),
        ("norm1", "layer_norm"),
        ("norm2", "final_layer_norm"),
    ):
        state |= {f"{mine}.{part}": tensors[f"{at}.{theirs}.{part}"] for part in ("weight", "bias")}
    return load(layer, state)(x)


def distilhubert(tensors: Tensors, audio: Any) -> Any:
    x = audio[:, None]
    for k, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        at = f"feature_extractor.conv_layers.{k}"
        x = functional.conv1d(x, torch.from_numpy(tensors[f"{at}.conv.weight"]), stride=stride)
        if k == 0:
            weight, bias = (torch.from_numpy(tensors[f"{at}.layer_norm.{p}"]) for p in ("weight", "bias"))
            x = functional.group_norm(x, 512, weight, bias)
        x = functional.gelu(x)
    x = linear(tensors, "feature_projection.projection", x.transpose(1, 2))
    at = "encoder.pos_conv_embed.conv"
    position = nn.utils.parametrizations.weight_norm(nn.Conv1d(768, 768, 128, padding=64, groups=16), dim=2)
    state = {
        "bias": tensors[f"{at}.bias"],
        "parametrizations.weight.original0": tensors[f"{at}.weight_g"],
        "parametrizations.weight.original1": tensors[f"{at}.weight_v"],
    }
    placed = functional.gelu(load(position, state)(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
    x = layer_norm(tensors, "encoder.layer_norm", x + placed)
    for k in range(2):
        x = transformer(tensors, f"encoder.layers.{k}", x)
    return x


def test_distilhubert_is_torchs(tmp_path: Path) -> None:
    path, tensors = built("distilhubert", tmp_path)
    audio = np.random.default_rng(0).standard_normal((1, 16_000)).astype(np.float32)
    with torch.no_grad():
        expected = distilhubert(tensors, torch.from_numpy(audio)).numpy()
    np.testing.assert_allclose(answer(path, {"audio": audio}), expected, atol=1e-3)
