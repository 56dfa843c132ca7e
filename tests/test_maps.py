import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam, Saliency
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import explain as package
from explain import ModelError, upsample
from explain import maps as maps_module
from trainables import ResNet18

# Exact unless a test says otherwise.
explain = functools.partial(package.explain, dtype=torch.float32)
grad_cam = functools.partial(package.grad_cam, dtype=torch.float32)
stream = functools.partial(package.stream, dtype=torch.float32)


class Tiny(nn.Module):
    """relu(1x1 convolution) -> mean -> linear, with weights small enough to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]])[..., None, None])
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
            self.head.bias.copy_(torch.tensor([0.25, -0.5]))

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.mix(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


# Red minus blue is [[1, -1], [-1, 3]], half of green [[2, 1], [1, 4]]. So the activations are [[1, 0], [0, 3]] and
# [[2, 1], [1, 4]], their means 1 and 2, and the logits 1 - 2 + 0.25 = -0.75 and 2 + 2 - 0.5 = 3.5.
TINY_IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[4.0, 2.0], [2.0, 8.0]], [[0.0, 3.0], [4.0, 1.0]]]])


class MaxPooled(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).amax((2, 3)))


class SumPooled(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).sum((2, 3)))


class Rescaled(Tiny):
    factor = 1.02

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class RescaledMore(Rescaled):
    factor = 1.05


class Shifted(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([0.05, 0.0])


class NoFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)


class NoHead(nn.Module):
    def features(self, x: Tensor) -> Tensor:
        return x


class DeepHead(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class OfBatch(Tiny):
    """Normalized by the batch that an image happens to be in, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.mix(x)))


class Raising(ResNet18):
    def features(self, x: Tensor) -> Tensor:
        super().features(x)
        raise RuntimeError("features gave up")


def resnet(kind: type[ResNet18] = ResNet18, **options: float) -> ResNet18:
    """A network with 5 classes, biases and running statistics that are not the initial zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = kind(num_classes=5, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model.eval()


def images(number: int = 3) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def oracle(model: nn.Module, x: Tensor, target: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Saliency and Grad-CAM by their definitions: gradients by autograd, averaged over positions, weighing channels."""
    x = x.clone().requires_grad_()
    activations = model.features(x)
    logits = model.head(activations.mean((2, 3)))
    scores = logits if score == "logit" else logits.log_softmax(1)
    total = sum(scores[i, c] for i, c in enumerate(target))
    to_input, to_features = torch.autograd.grad(total, (x, activations))
    weights = to_features.mean((2, 3), keepdim=True)
    return to_input.abs().amax(1), (weights * activations).sum(1).detach()


@pytest.mark.parametrize(
    ("target", "saliency", "cam"),
    [
        (0, [[0.25, 0.125], [0.125, 0.25]], [[-0.25, -0.25], [-0.25, -0.25]]),
        (1, [[0.5, 0.125], [0.125, 0.5]], [[1.0, 0.25], [0.25, 2.5]]),
        (None, [[0.5, 0.125], [0.125, 0.5]], [[1.0, 0.25], [0.25, 2.5]]),
    ],
)
def test_maps_of_a_tiny_network_are_those_computed_by_hand(target, saliency, cam):
    maps = explain(Tiny(), TINY_IMAGE, None if target is None else torch.tensor([target]))
    assert maps.logits.tolist() == [[-0.75, 3.5]]
    assert maps.target.tolist() == [1 if target is None else target]
    assert maps.saliency.tolist() == [saliency]
    assert maps.cam.tolist() == [cam]


def test_shapes_and_types_are_those_documented():
    maps = explain(resnet(), images(3))
    assert [tuple(t.shape) for t in vars(maps).values()] == [(3, 5), (3,), (3, 32, 32), (3, 4, 4)]
    assert [t.dtype for t in vars(maps).values()] == [torch.float32, torch.int64, torch.float32, torch.float32]
    assert not any(t.requires_grad for t in vars(maps).values())
    assert (maps.saliency >= 0).all()
    assert (maps.cam < 0).any()  # not rectified


@pytest.mark.parametrize("model", [resnet(), ResNet18(num_classes=100, width=64).eval()], ids=["small", "reference"])
def test_maps_agree_with_captum(model):
    x, target = images(), torch.tensor([0, 3, 4])
    maps = explain(model, x, target)
    saliency = Saliency(model).attribute(x.clone().requires_grad_(), target, abs=True).amax(1)
    cam = LayerGradCam(model, model.layer4).attribute(x.clone(), target, relu_attributions=False)[:, 0]
    torch.testing.assert_close(maps.saliency, saliency, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.cam, cam.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_maps_agree_with_autograd(score, dtype, atol):
    model, x, target = resnet().to(dtype), images().to(dtype), torch.tensor([1, 0, 2])
    maps = explain(model, x, target, score)
    saliency, cam = oracle(model, x, target, score)
    torch.testing.assert_close(maps.saliency, saliency, rtol=0, atol=atol, check_dtype=False)
    torch.testing.assert_close(maps.cam, cam, rtol=0, atol=atol, check_dtype=False)


def test_grad_cam_alone_is_that_of_both_maps():
    model, x, target = resnet(), images(), torch.tensor([1, 0, 2])
    for score in ("logit", "log_prob"):
        assert torch.equal(grad_cam(model, x, target=target, score=score), explain(model, x, target, score).cam)
    assert torch.equal(grad_cam(model, x), explain(model, x).cam)


@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_gradients_at_the_last_stage_give_the_closed_form(score):
    model, x, target = resnet(), images(), torch.tensor([1, 0, 2])
    exact, by_gradient = explain(model, x, target, score), explain(model, x, target, score, layer=model.layer4)
    for name in vars(exact):
        torch.testing.assert_close(getattr(by_gradient, name), getattr(exact, name), rtol=0, atol=1e-6)
    alone = grad_cam(model, x, model.layer4, target, score)
    torch.testing.assert_close(alone, exact.cam, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["stem", "layer2", "layer3.0.conv1", "layer4.1.conv2", "layer4.1.bn2"])
def test_grad_cam_of_any_layer_agrees_with_captum(path):
    model, x, target = resnet(), images(), torch.tensor([0, 3, 4])
    layer = model.get_submodule(path)
    expected = LayerGradCam(model, layer).attribute(x.clone(), target, relu_attributions=False)[:, 0].detach()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(grad_cam(model, x, layer, target), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(explain(model, x, target, layer=layer).cam, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["layer4", "layer4.1.bn2", "layer3.0.bn1"])
def test_networks_that_are_not_ours_are_explained_too(path):
    """torchvision's ResNet overwrites the output of its batch norms in place."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    x, target = images(2), torch.tensor([6, 2])
    layer = model.get_submodule(path)
    with pytest.raises(ModelError, match=r"ResNet: .*name a layer, as in layer=model\.layer4"):
        explain(model, x)
    maps = explain(model, x, target, layer=layer)
    saliency = Saliency(model).attribute(x.clone().requires_grad_(), target, abs=True).amax(1)
    cam = LayerGradCam(model, layer).attribute(x.clone(), target, relu_attributions=False)[:, 0].detach()
    torch.testing.assert_close(maps.saliency, saliency, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.cam, cam, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_cam(model, x, layer, target), cam, rtol=0, atol=1e-6)


def test_maps_as_pytorch_grad_cam_shows_them():
    model, x, target = resnet(), images(), [0, 3, 4]
    with GradCAM(model, [model.layer4]) as theirs:
        expected = theirs(x.clone(), [ClassifierOutputTarget(c) for c in target])

    def stretch(maps: Tensor) -> Tensor:
        maps = maps - maps.amin((1, 2), keepdim=True)
        return maps / (1e-7 + maps.amax((1, 2), keepdim=True))

    shown = stretch(upsample(stretch(grad_cam(model, x, target=torch.tensor(target)).relu()), (32, 32)))
    torch.testing.assert_close(shown, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_several_classes_of_an_image_are_explained_at_once():
    model, x, targets = resnet(), images(2), torch.tensor([[4, 0, 1], [2, 2, 3]])
    for layer in (None, model.layer4, model.layer2):
        maps = explain(model, x, targets, layer=layer)
        side = 16 if layer is model.layer2 else 4
        assert [tuple(t.shape) for t in vars(maps).values()] == [(2, 5), (2, 3), (2, 3, 32, 32), (2, 3, side, side)]
        assert torch.equal(maps.target, targets)
        torch.testing.assert_close(grad_cam(model, x, layer, targets), maps.cam, rtol=0, atol=1e-6)
        for t in range(3):
            single = explain(model, x, targets[:, t], layer=layer)
            torch.testing.assert_close(maps.saliency[:, t], single.saliency, rtol=0, atol=1e-6)
            torch.testing.assert_close(maps.cam[:, t], single.cam, rtol=0, atol=1e-6)


def test_a_stream_is_its_batches_explained():
    model, x, targets = resnet(), images(5), torch.tensor([1, 0, 2, 4, 4])
    for given in (None, targets):
        streamed = list(stream(model, iter(x.split(2)), None if given is None else given.split(2)))
        assert [len(maps.target) for maps in streamed] == [2, 2, 1]
        whole = explain(model, x, given)
        for name in vars(whole):
            joined = torch.cat([getattr(maps, name) for maps in streamed])
            torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-6)


def test_a_stream_asks_for_a_batch_when_it_is_needed_and_leaves_the_mode_between():
    model, asked = resnet().train(), []

    def batches():
        for i in range(3):
            asked.append(i)
            yield images(2)

    for count, _ in enumerate(stream(model, batches()), start=1):
        assert len(asked) == count
        assert model.training
    assert count == 3


@pytest.mark.parametrize("wrap", [tuple, list])
def test_a_stream_takes_the_images_of_batches_that_have_more(wrap):
    model, x = resnet(), images(5)
    labels = torch.tensor([1, 0, 2, 4, 4])
    expected = explain(model, x)
    for batches in (
        [wrap(pair) for pair in zip(x.split(2), labels.split(2), strict=True)],
        [wrap([part]) for part in x.split(2)],
        DataLoader(TensorDataset(x, labels), batch_size=2),
    ):
        streamed = list(stream(model, batches))
        for name in vars(expected):
            joined = torch.cat([getattr(maps, name) for maps in streamed])
            torch.testing.assert_close(joined, getattr(expected, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_stream_of_another_length_than_its_targets_is_refused(number):
    targets = [torch.tensor([1, 0])] * number
    for given in (targets, iter(targets)):
        streamed = stream(resnet(), [images(2)] * 3, given)
        for _ in range(min(number, 3)):
            assert next(streamed).cam.shape == (2, 4, 4)
        with pytest.raises(ValueError, match="zip"):
            next(streamed)


def test_a_stream_of_no_batches_is_empty_with_targets_and_without():
    assert list(stream(resnet(), [])) == []
    assert list(stream(resnet(), [], [])) == []


def test_some_batches_of_a_stream_may_be_of_the_predicted_classes():
    model, x, target = resnet(), images(4), torch.tensor([1, 0])
    first, second = stream(model, x.split(2), [target, None])
    assert torch.equal(first.target, target)
    assert torch.equal(second.target, explain(model, x[2:]).target)


@pytest.mark.parametrize(
    ("path", "found"),
    [("relu", "3 tensors"), ("unused", "0 tensors"), ("head", r"one of shape \(2, 5\)"), ("pair", "one of shape")],
)
def test_a_layer_that_has_no_map_is_refused(path, found):
    class Odd(ResNet18):
        def __init__(self):
            super().__init__(num_classes=5, width=4)
            self.relu, self.unused, self.pair = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(2)

        def features(self, x):
            for _ in range(3):
                x = self.relu(x)
            out = super().features(x)
            return self.pair(out).view(out.shape)

    model = Odd().train()
    for function in (explain, grad_cam):
        with pytest.raises(ModelError, match=rf"needs one output \(N, K, h, w\) a batch, not {found}"):
            function(model, images(2), layer=model.get_submodule(path))
    assert model.training
    assert set(state(model)["hooks"]) == {0}


def test_scores_have_different_maps():
    model, x = resnet(), images()
    logit, log_prob = explain(model, x, score="logit"), explain(model, x, score="log_prob")
    assert torch.equal(logit.target, log_prob.target)
    assert (logit.cam - log_prob.cam).abs().max() > 0.01
    assert (logit.saliency - log_prob.saliency).abs().max() > 0.001


def test_logits_that_differ_by_a_constant_have_the_same_maps_of_log_prob_alone():
    model, moved = resnet(), resnet()
    with torch.no_grad():
        moved.head.weight += 1.0  # adds the same, image-dependent constant to every logit
    maps, other = (explain(m, images(), torch.tensor([1, 0, 2]), "log_prob") for m in (model, moved))
    torch.testing.assert_close(maps.cam, other.cam, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.saliency, other.saliency, rtol=0, atol=1e-5)
    assert (explain(model, images()).cam - explain(moved, images()).cam).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_cam_and_bias_add_up_to_the_logit(dtype, atol):
    model, x = resnet().to(dtype), images(4).to(dtype)
    for target in (None, torch.tensor([4, 3, 2, 1])):
        maps = explain(model, x, target)
        total = maps.cam.sum((1, 2)) + model.head.bias[maps.target]
        torch.testing.assert_close(total, maps.logits.gather(1, maps.target[:, None])[:, 0], rtol=0, atol=atol)


def test_a_batch_gives_the_maps_of_its_images_one_by_one():
    model, x, target = resnet(), images(4), torch.tensor([4, 3, 2, 1])
    whole = explain(model, x, target)
    for i in range(4):
        single = explain(model, x[i : i + 1], target[i : i + 1])
        for name in ("logits", "saliency", "cam"):
            torch.testing.assert_close(getattr(whole, name)[i], getattr(single, name)[0], rtol=0, atol=1e-6)


def test_target_is_predicted_unless_given():
    model, x = resnet(), images(4)
    with torch.no_grad():
        logits = model(x)
    maps = explain(model, x)
    torch.testing.assert_close(maps.logits, logits, rtol=0, atol=1e-6)
    assert torch.equal(maps.target, logits.argmax(1))
    again, other = explain(model, x, maps.target), explain(model, x, (maps.target + 1) % 5)
    assert torch.equal(maps.saliency, again.saliency)
    assert torch.equal(maps.cam, again.cam)
    assert (other.cam - maps.cam).abs().amax((1, 2)).min() > 1e-3


def test_bf16_is_close_to_fp32():
    seen = []

    class Watched(ResNet18):
        def features(self, x):
            out = super().features(x)
            seen.append((len(x), out.dtype))
            return out

    x, target = images(), torch.tensor([1, 0, 2])
    maps, exact = explain(resnet(Watched), x, target, dtype=torch.bfloat16), explain(resnet(), x, target)
    # Two images more in full precision show whether the closed form is exact.
    assert set(seen) == {(3, torch.bfloat16), (1, torch.bfloat16), (2, torch.float32)}
    with torch.autocast("cpu", torch.bfloat16):
        saliency, cam = oracle(resnet(), x, target, "logit")
    torch.testing.assert_close(maps.saliency, saliency, rtol=0, atol=0.01 * saliency.max().item(), check_dtype=False)
    torch.testing.assert_close(maps.cam, cam, rtol=0, atol=0.01 * cam.abs().max().item(), check_dtype=False)
    # The way back through 17 layers in bf16 is rougher than the way there.
    for name, limit in (("logits", 0.03), ("cam", 0.03), ("saliency", 0.25)):
        rough, fine = getattr(maps, name), getattr(exact, name)
        assert rough.dtype == torch.float32
        error = (rough - fine).norm() / fine.norm()
        assert 0 < error < limit, f"{name} is off by {error:.3f}"


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_the_hardwares_unless_given(fast, monkeypatch):
    monkeypatch.setattr(maps_module, "multiplies_bf16", lambda device: fast)
    model, x, target = resnet(), images(), torch.tensor([1, 0, 2])
    half, exact = (package.explain(model, x, target, dtype=t) for t in (torch.bfloat16, torch.float32))
    assert not torch.equal(half.saliency, exact.saliency)
    found = package.explain(model, x, target)
    assert torch.equal(found.saliency, (half if fast else exact).saliency)
    assert torch.equal(package.grad_cam(model, x, target=target), found.cam)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(package.explain(model, x, target).saliency, half.saliency)
        assert torch.equal(package.explain(model, x, target, dtype=torch.float32).saliency, exact.saliency)
    assert package.explain(model.double(), x.double(), target).saliency.dtype == torch.float64


def state(model: nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {name: t.tolist() for name, t in model.state_dict(keep_vars=False).items()},
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True, "mixed"])
def test_a_network_is_afterwards_as_it_was(raises, training):
    model = resnet(Raising if raises else ResNet18, dropout=0.5).train(bool(training))
    if training == "mixed":  # as in fine-tuning: the first stage frozen, with its statistics
        model.layer1.eval().requires_grad_(False)
        model.head.bias.grad = torch.ones(5)
    before = copy.deepcopy(state(model))
    calls = [
        lambda: explain(model, images(2)),
        lambda: explain(model, images(2), layer=model.layer2),
        lambda: grad_cam(model, images(2)),
        lambda: grad_cam(model, images(2), model.layer2),
        lambda: next(stream(model, [images(2)])),
    ]
    for call in calls:
        if raises:
            with pytest.raises(RuntimeError, match="features gave up"):
                call()
        else:
            call()
    after = state(model)
    assert after == before
    assert after["training"][0] == bool(training)
    assert set(after["hooks"]) == {0}
    if training != "mixed":
        assert set(after["grad"]) == {None}


def test_a_network_in_training_is_explained_in_eval_mode():
    expected, found = explain(resnet(dropout=0.5), images()), explain(resnet(dropout=0.5).train(), images())
    for name in vars(expected):
        assert torch.equal(getattr(expected, name), getattr(found, name))


def test_a_frozen_network_has_the_same_maps():
    expected, found = explain(resnet(), images()), explain(resnet().requires_grad_(False), images())
    for name in vars(expected):
        torch.testing.assert_close(getattr(expected, name), getattr(found, name), rtol=0, atol=1e-6)


def test_gradients_are_taken_also_where_they_are_switched_off():
    expected = explain(resnet(), images())
    with torch.no_grad():
        found = explain(resnet(), images())
    assert torch.equal(expected.saliency, found.saliency)


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize("path", [None, "layer2"])
def test_maps_are_made_in_inference_mode_too(path, score):
    model, target = resnet(), torch.tensor([1, 0, 2])
    layer = path and model.get_submodule(path)
    expected = explain(model, images(), target, score, layer=layer)
    with torch.inference_mode():
        for x in (images(), images().clone()):
            found = explain(model, x, target, score, layer=layer)
            (streamed,) = stream(model, [x], [target], score, layer=layer)
            alone = grad_cam(model, x, layer, target, score)
            assert torch.is_inference_mode_enabled()
            assert torch.equal(x, images())
            for name in vars(expected):
                assert torch.equal(getattr(found, name), getattr(expected, name))
                assert torch.equal(getattr(streamed, name), getattr(expected, name))
            torch.testing.assert_close(alone, expected.cam, rtol=0, atol=1e-6)
    found = found.cam.clone().requires_grad_()
    found.sum().backward()  # an inference tensor could not


@pytest.mark.parametrize("path", [None, "layer2"])
def test_classes_chosen_in_inference_mode_are_explained(path):
    model = resnet()
    layer = path and model.get_submodule(path)
    expected = explain(model, images(), torch.tensor([1, 0, 2]), layer=layer)
    with torch.inference_mode():
        target = torch.tensor([1, 0, 2])
        found = [explain(model, images(), target, layer=layer).cam, grad_cam(model, images(), layer, target)]
    found += [explain(model, images(), target, layer=layer).cam, grad_cam(model, images(), layer, target)]
    for cam in found:
        torch.testing.assert_close(cam, expected.cam, rtol=0, atol=1e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_images_are_left_alone(requires_grad):
    x = images(2).requires_grad_(requires_grad)
    explain(resnet(), x)
    assert torch.equal(x.detach(), images(2))
    assert x.requires_grad == requires_grad
    assert x.grad is None


@pytest.mark.parametrize("kind", [NoFeatures, NoHead, DeepHead, MaxPooled, SumPooled, Rescaled, RescaledMore, Shifted])
@pytest.mark.parametrize("given", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}])
def test_a_network_without_exact_maps_is_refused(kind, given, monkeypatch):
    monkeypatch.setattr(maps_module, "multiplies_bf16", lambda device: True)
    model = kind().train()
    for call in (package.explain, package.grad_cam, lambda m, x, **g: next(package.stream(m, [x], **g))):
        with pytest.raises(ModelError, match=rf"{kind.__name__}.*name a layer"):
            call(model, TINY_IMAGE, **given)
    assert model.training


@pytest.mark.parametrize("kind", [MaxPooled, SumPooled, Rescaled, Shifted])
def test_a_network_without_a_closed_form_is_explained_at_a_layer(kind):
    model = kind()
    expected = LayerGradCam(model, model.mix).attribute(TINY_IMAGE, 1, relu_attributions=False)[:, 0].detach()
    for cam in (
        explain(model, TINY_IMAGE, torch.tensor([1]), layer=model.mix).cam,
        grad_cam(model, TINY_IMAGE, model.mix, torch.tensor([1])),
    ):
        torch.testing.assert_close(cam, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_with_exact_maps_is_refused_in_no_precision(fast, monkeypatch):
    monkeypatch.setattr(maps_module, "multiplies_bf16", lambda device: fast)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        for call in (package.explain, package.grad_cam):
            call(Tiny(), TINY_IMAGE, dtype=dtype)
            call(resnet(), images(4), dtype=dtype)
        model = resnet()
        package.explain(model, images(4), layer=model.layer2, dtype=dtype)


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float32}])
@pytest.mark.parametrize("at_layer", [False, True])
def test_a_network_whose_logits_depend_on_the_batch_is_refused(at_layer, given, monkeypatch):
    monkeypatch.setattr(maps_module, "multiplies_bf16", lambda device: True)
    model = OfBatch().train()
    layer = model.mix if at_layer else None
    for call in (package.explain, package.grad_cam, lambda m, x, **g: next(package.stream(m, [x], **g))):
        with pytest.raises(ModelError, match="OfBatch: what it says of an image depends on the batch"):
            call(model, torch.cat([TINY_IMAGE, TINY_IMAGE.flip(1) * 3]), layer=layer, **given)
    assert model.training
    assert set(state(model)["hooks"]) == {0}


@pytest.mark.parametrize("at_layer", [False, True])
def test_a_network_of_one_logit_has_maps(at_layer):
    model = Tiny()
    model.head = nn.Linear(2, 1)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[2.0, 1.0]]))
        model.head.bias.fill_(-0.5)
    layer = model.mix if at_layer else None
    maps = explain(model, TINY_IMAGE, layer=layer)
    assert maps.logits.tolist() == [[3.5]]
    assert maps.target.tolist() == [0]
    assert maps.saliency.tolist() == [[[0.5, 0.125], [0.125, 0.5]]]
    # Before the ReLU, red minus blue has a gradient of 2 / 4 at two of four positions, half of green 1 / 4 at each.
    expected = [[0.75, 0.0], [0.0, 1.75]] if at_layer else [[1.0, 0.25], [0.25, 2.5]]
    assert maps.cam.tolist() == [expected]
    assert torch.equal(grad_cam(model, TINY_IMAGE, layer), maps.cam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at_layer", [False, True])
def test_images_with_nan_have_maps_of_nan_and_others_as_they_would(at_layer, which, dtype):
    model, x, target = resnet(), images(3), torch.tensor([1, 0, 2])
    layer = model.layer4 if at_layer else None
    expected = package.explain(model, x, target, layer=layer, dtype=dtype)
    x[which] = float("nan")
    found = package.explain(model, x, target, layer=layer, dtype=dtype)
    alone = package.grad_cam(model, x, layer, target, dtype=dtype)
    assert found.logits[which].isnan().all()
    assert found.cam[which].isnan().all()
    assert alone[which].isnan().all()
    others = [i for i in range(3) if i != which]
    for name in ("logits", "saliency", "cam"):
        assert torch.equal(getattr(found, name)[others], getattr(expected, name)[others])
    assert torch.equal(alone[others], found.cam[others])


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize("at_layer", [False, True])
def test_images_with_nan_have_saliency_of_nan_too(at_layer, score):
    model, x = resnet(), images(2)
    x[1] = float("nan")
    saliency = explain(model, x, score=score, layer=model.layer4 if at_layer else None).saliency
    assert saliency.isnan().all(dim=1).all(dim=1).tolist() == [False, True]


def test_nothing_but_nan_has_nothing_but_nan():
    model, x = Tiny(), torch.full((2, 3, 2, 2), float("nan"))
    for score in ("logit", "log_prob"):
        assert explain(model, x, score=score).cam.isnan().all()
        assert explain(model, x, score=score, layer=model.mix).logits.isnan().all()
        assert grad_cam(model, x, score=score).isnan().all()


@pytest.mark.parametrize("at_layer", [False, True])
def test_no_images_have_no_maps(at_layer):
    model = resnet()
    layer = model.layer2 if at_layer else None
    maps = explain(model, images(0), layer=layer)
    side = 16 if at_layer else 4
    assert [tuple(t.shape) for t in vars(maps).values()] == [(0, 5), (0,), (0, 32, 32), (0, side, side)]
    assert grad_cam(model, images(0), layer).shape == (0, side, side)


class InPairs(Tiny):
    """With a layer that returns a tuple, as recurrent ones and attention do."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    def __init__(self) -> None:
        super().__init__()
        self.pair = self.Pair()

    def features(self, x: Tensor) -> Tensor:
        return self.pair(super().features(x))[0]


def test_a_layer_that_returns_a_tuple_is_refused():
    model = InPairs()
    for function in (explain, grad_cam):
        with pytest.raises(ModelError, match=r"Pair: Grad-CAM needs one output \(N, K, h, w\) a batch, not 0 tensors"):
            function(model, TINY_IMAGE, layer=model.pair)
        function(model, TINY_IMAGE, layer=model.mix)
    assert set(state(model)["hooks"]) == {0}


@pytest.mark.parametrize(("layer", "kind"), [(torch.tensor([0, 1]), "Tensor"), ("layer4", "str"), (0, "int")])
def test_a_layer_that_is_no_module_is_refused(layer, kind):
    with pytest.raises(ValueError, match=f"layer must be a module of the model, not {kind}"):
        grad_cam(resnet(), images(2), layer)
    with pytest.raises(ValueError, match=f"layer must be a module of the model, not {kind}"):
        explain(resnet(), images(2), layer=layer)


@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (images(2)[0], None, r"\(N, C, H, W\)"),
        (images(2)[None], None, r"\(N, C, H, W\)"),
        ((images(2) * 255).to(torch.uint8), None, "uint8"),
        (images(2), torch.tensor([0]), r"\(2,\), or \(2, T\) for T classes each, not \(1,\)"),
        (images(2), torch.tensor([[0, 1]]), r"\(2, T\) for T classes each, not \(1, 2\)"),
        (images(2), torch.tensor([[[0]], [[1]]]), r"\(2, T\) for T classes each, not \(2, 1, 1\)"),
        (images(2), torch.tensor(0), r"\(2,\), or \(2, T\) for T classes each, not \(\)"),
    ],
)
def test_wrong_shapes_are_refused(x, target, message):
    for function in (explain, grad_cam):
        with pytest.raises(ValueError, match=message):
            function(resnet(), x, target=target)
    with pytest.raises(ValueError, match=r"score must be one of \('logit', 'log_prob'\), not 'prob'"):
        grad_cam(resnet(), images(2), score="prob")


def test_upsample_is_bilinear():
    maps = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(maps.unsqueeze(1), (32, 20), mode="bilinear", align_corners=False).squeeze(1)
    assert torch.equal(upsample(maps, (32, 20)), expected)
    by_hand = upsample(torch.tensor([[[0.0, 1.0]]]), (1, 4))
    assert by_hand.tolist() == [[[0.0, 0.25, 0.75, 1.0]]]


class Clamped(Tiny):
    """Closed form on dark images only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)).clamp(max=0.2))


class Overwriting(Tiny):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x.sub_(0.25))


CALLS = (package.explain, package.grad_cam, lambda m, x, **g: next(package.stream(m, [x], **g)))


@pytest.mark.parametrize("call", CALLS)
def test_a_network_is_refused_whatever_its_first_image_is(call):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    broken, dark = x.clone(), x.clone()
    broken[0], dark[0] = torch.nan, 0.0
    for model, given in ((MaxPooled(), broken), (Clamped(), dark)):
        with pytest.raises(ModelError, match="name a layer"):
            call(model, given)


def test_a_stream_looks_at_the_first_batch_that_can_be_looked_at():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    streamed = stream(MaxPooled(), [torch.full_like(x, torch.nan), x])
    assert next(streamed).cam.isnan().all()
    with pytest.raises(ModelError, match="name a layer"):
        next(streamed)


@pytest.mark.parametrize("at_layer", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_a_network_may_overwrite_its_input(at_layer, number):
    x = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    before, model = x.clone(), Overwriting()
    layer = model.mix if at_layer else None
    maps, cam = package.explain(model, x, layer=layer), package.grad_cam(model, x, layer)
    assert torch.equal(x, before)
    plain = Tiny()
    expected = package.explain(plain, x - 0.25, layer=plain.mix if at_layer else None)
    for found, wanted in ((maps.saliency, expected.saliency), (maps.cam, expected.cam), (cam, expected.cam)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("call", CALLS[:2])
@pytest.mark.parametrize("bad", [-1, 5])
def test_a_target_that_is_no_class_is_refused(call, bad):
    for target in (torch.tensor([0, bad, 1]), torch.tensor([[0, 1], [2, bad], [3, 4]])):
        with pytest.raises(ValueError, match="from 0 to 4"):
            call(resnet(), images(3), target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_target_of_another_kind_than_numbers_of_classes_is_refused(dtype):
    with pytest.raises(ValueError, match=f"int64, not {dtype}"):
        package.explain(resnet(), images(3), torch.ones(3, dtype=dtype))


class Tokens(Tiny):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x).mean((2, 3))


class InTuple(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x),)


class Dense(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


@pytest.mark.parametrize("call", CALLS[:2])
def test_what_a_network_of_another_kind_returns_is_said(call):
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"Tokens: features\(x\) must be .* not a tensor \(2, 2\)"):
        call(Tokens(), x)
    for kind, found in ((InTuple, "a tuple"), (Dense, r"a tensor \(2, 2, 8, 8\)")):
        model = kind()
        with pytest.raises(ModelError, match=rf"{kind.__name__}: it must return logits \(N, C\), not {found}"):
            call(model, x, layer=model.mix)
