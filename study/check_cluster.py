"""Checks a Ray cluster's YAML file offline, before `ray up` costs money: ``python -m study check-cluster FILE``."""

import contextlib
import copy
import io
import json
import logging
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from study.settings import SettingsError, read_yaml, suggest

TOKEN = "~/.ray/auth_token"
# Of Ray's providers, those that `ray up` knows; KubeRay makes clusters by itself.
PROVIDERS = ("aws", "gcp", "azure", "aliyun", "vsphere", "local")
_STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
_JSON_TYPES = {"object": "a mapping", "array": "a list", "string": "text", "boolean": "true or false"}


def check_cluster(file: Path) -> tuple[list[str], list[str]]:
    """Look for what would keep a cluster from starting, from running studies, or from being safe.

    Args:
        file: as for ``ray up``; as there, paths in its file_mounts are relative to the current directory.

    Returns:
        What is wrong, and what is left to do before ``ray up``; one sentence each, beginning with the place.
    """
    try:
        config = read_yaml(file.read_text(encoding="utf-8"), "file")
    except SettingsError as error:
        return [str(error).removeprefix("file: ")], []
    except (OSError, UnicodeDecodeError) as error:
        return [f"cannot be read ({getattr(error, 'strerror', None) or error})"], []
    if not isinstance(config, dict):
        return ["is empty" if config is None else f"must be a mapping, not {type(config).__name__}"], []
    # Each kind of check counts on what the one before has seen.
    for checks in ((_schema, _texts), (_provider, _docker), (_ray,)):
        wrong = [sentence for check in checks for sentence in check(config)]
        if wrong:
            return wrong, []
    rest = (_mounts, _key, _versions, _starting, _places)
    return [sentence for check in rest for sentence in check(config)], list(_to_do(config))


def _schema(config: dict[str, Any]) -> Iterator[str]:
    """Misspelt keys and wrong types, by Ray's own schema."""
    file = Path(ray.autoscaler.__path__[0]) / "ray-schema.json"
    schema = json.loads(file.read_text())
    for error in sorted(jsonschema.Draft7Validator(schema).iter_errors(config), key=lambda e: list(map(str, e.path))):
        place = ".".join(map(str, error.absolute_path))
        match error.validator:
            case "additionalProperties":
                known = list(error.schema["properties"])
                for name in error.instance.keys() - set(known):
                    yield f"{f'{place}.' if place else ''}{name}: is not known here{suggest(str(name), known)}"
            case "required":
                missing = error.message.replace(" is a required property", " is missing")
                yield f"{place}: {missing}" if place else missing
            case "type":
                kind = _JSON_TYPES.get(str(error.validator_value), f"a {error.validator_value}")
                yield f"{place}: {error.instance!r} should be {kind}"
            case _:
                yield f"{place}: {error.message}"


def _texts(config: dict[str, Any]) -> Iterator[str]:
    """What the schema leaves open and Ray takes for text."""
    for name in ("file_mounts", "docker", "auth"):
        if name in config and not isinstance(config[name], dict):
            yield f"{name}: {config[name]!r} should be a mapping"
    for target, source in _mapping(config, "file_mounts").items():
        if not isinstance(source, str):
            yield f"file_mounts.{target}: {source!r} should be a path"
    for where, part in (("docker.", _mapping(config, "docker")), ("", config)):
        for name, values in part.items():
            if name.endswith(("_commands", "run_options")):
                if not isinstance(values, list):
                    yield f"{where}{name}: {values!r} should be a list"
                    continue
                yield from (
                    f"{where}{name}: {value!r} should be text" for value in values if not isinstance(value, str)
                )


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _provider(config: dict[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    kind = provider.get("type")
    if kind not in PROVIDERS:
        yield f"provider.type: {'is missing' if kind is None else kind!r}; ray up knows {', '.join(PROVIDERS)}"
    if kind == "aws" and not provider.get("region"):
        yield "provider.region: is missing"
    by_coordinator = provider.get("coordinator_address")
    if kind == "local" and not by_coordinator and not (provider.get("head_ip") and "worker_ips" in provider):
        yield "provider: needs head_ip and worker_ips, the addresses of your machines"
    elif kind == "local" and not by_coordinator and not provider["worker_ips"]:
        yield "provider.worker_ips: is empty: name the machines besides head_ip"


def _docker(config: dict[str, Any]) -> Iterator[str]:
    docker = config.get("docker")
    if docker is None:
        return
    if not docker.get("container_name"):
        yield "docker.container_name: is missing; without it Ray uses no container, and none of its options"
    if not docker.get("image") and not (docker.get("head_image") and docker.get("worker_image")):
        yield "docker.image: is missing; give it, or both head_image and worker_image"


def _ray(config: dict[str, Any]) -> Iterator[str]:
    """What Ray itself would say."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # jsonschema's, ValueError, KeyError, AssertionError: whatever Ray thinks of
        place = ".".join(str(part) for part in getattr(error, "absolute_path", ()))
        reason = str(getattr(error, "message", "") or error).strip().splitlines() or [type(error).__name__]
        yield f"{place}: {reason[0]}" if place else reason[0]


def _mounts(config: dict[str, Any]) -> Iterator[str]:
    mounts = _mapping(config, "file_mounts")
    for target, source in mounts.items():
        if not _is_token(source) and not Path(source).expanduser().exists():
            yield f"file_mounts.{target}: there is no {source} here to copy"
    if not _is_token(mounts.get(TOKEN, "")):
        yield f"file_mounts: has no {TOKEN}: {TOKEN}, without which nodes do not trust each other"


def _is_token(path: str) -> bool:
    return Path(path).expanduser() == Path(TOKEN).expanduser()


def _key(config: dict[str, Any]) -> Iterator[str]:
    key = _mapping(config, "auth").get("ssh_private_key")
    if key and not Path(key).expanduser().exists():
        yield f"auth.ssh_private_key: there is no {key}"


def _versions(config: dict[str, Any]) -> Iterator[str]:
    """A cluster speaks only with the same version of Ray."""
    here, docker = version("ray"), _mapping(config, "docker")
    for name in ("image", "head_image", "worker_image"):
        image = docker.get(name) or ""
        found = re.search(r"rayproject/ray[\w-]*(?::(\d[\w.]*))?", image)
        if found and not found[1] and "@" not in image:
            yield f"docker.{name}: {image} does not pin a version of Ray; write rayproject/ray:{here}-..."
        elif found and found[1] and found[1] != here:
            yield f"docker.{name}: {image} has Ray {found[1]}, but here is {here}; a cluster needs the same"
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for pin in re.findall(r"(?<![\w-])ray(?:\[[\w,]*\])?==([\w.]+)", " ".join(config.get(name) or [])):
            if pin != here:
                yield f"{name}: installs Ray {pin}, but here is {here}; a cluster needs the same"


def _starting(config: dict[str, Any]) -> Iterator[str]:
    docker = _mapping(config, "docker")
    for name, role in zip(_STARTS, ("head", "worker"), strict=True):
        commands = config.get(name) or []
        start = " ".join(commands)
        if "ray start" not in start:
            also = ", and Ray's own show the dashboard to everyone" if role == "head" and not commands else ""
            yield f"{name}: {'has no ray start' if commands else 'is missing'}{also}; write what cluster.yaml has"
            continue
        options = " ".join([*docker.get("run_options", ()), *docker.get(f"{role}_run_options", ())])
        if "RAY_AUTH_MODE=token" not in f"{options} {start}":
            yield f"{name}: RAY_AUTH_MODE=token is missing, so that anyone who reaches a port could run code"
        try:
            words = shlex.split(start)
        except ValueError as error:
            yield f"{name}: no shell could read it ({error})"
            continue
        if role == "head" and "--head" not in words:
            yield f"{name}: ray start has no --head"
        if role == "head" and (host := _option(words, "--dashboard-host")) not in (None, "127.0.0.1", "localhost"):
            yield f"{name}: --dashboard-host {host} shows it to others; use 127.0.0.1"
        if role == "worker" and not (_option(words, "--address") or "").startswith("$RAY_HEAD_IP"):
            yield f"{name}: ray start has no --address=$RAY_HEAD_IP:6379, so workers would stay alone"


def _option(words: list[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def _places(config: dict[str, Any]) -> Iterator[str]:
    provider = config["provider"]
    for zone in filter(None, str(provider.get("availability_zone") or "").split(",")):
        if not zone.strip().startswith(str(provider.get("region", ""))):
            yield f"provider.availability_zone: {zone.strip()} is not in {provider['region']}"
    for name, node in _mapping(config, "available_node_types").items():
        if provider["type"] == "aws" and not (node.get("node_config") or {}).get("InstanceType"):
            yield f"available_node_types.{name}.node_config: InstanceType is missing"
        fewest, most = node.get("min_workers", 0), node.get("max_workers")
        if most is not None and fewest > most:
            yield f"available_node_types.{name}: min_workers ({fewest}) is above max_workers ({most})"


def _to_do(config: dict[str, Any]) -> Iterator[str]:
    token = Path(TOKEN).expanduser()
    if not token.exists():
        yield f"make the cluster's token: ray get-auth-token --generate && chmod 600 {TOKEN}"
    elif token.stat().st_mode & 0o077:
        yield f"let nobody else read the cluster's token: chmod 600 {TOKEN}"
    placeholders = sorted(set(re.findall(r"fs-0{8}|FIXME|CHANGE_ME", yaml.safe_dump(config))))
    if placeholders:
        yield f"put your own in place of {', '.join(placeholders)}"
    for name, image in _mapping(config, "docker").items():
        if name.endswith("image") and "rayproject/ray" not in str(image):
            yield f"see that docker.{name} ({image}) has Ray {version('ray')}"
