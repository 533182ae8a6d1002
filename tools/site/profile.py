"""Which cluster this is, and what to ask for there: CPUs and memory a GPU, the account, notes with a date.

`slurm/sites/<name>.toml` holds defaults that were true on the day it names; what the live cluster says
always wins.
"""

import os
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_text
from tools.args import Parser, clock, name_of
from tools.place import checkout
from tools.site import slurm
from tools.site.cluster import Cluster, ask_cluster
from tools.toml import tomllib

FOLDER = Path("slurm") / "sites"
GENERIC_CPUS = 8  # a GPU; enough for one rank and its data, and never all of a node's
GENERIC_MEMORY_MB = 64_000  # a GPU


@dataclass(frozen=True)
class Site:
    """One site file. `raw` is the whole of it."""

    name: str
    path: Path | None = None
    raw: dict = field(default_factory=dict)

    def cpus_per_gpu(self, kind: str | None) -> int | None:
        """The CPUs to ask for with one GPU of a type, if the file says so."""
        return _whole(self._gpu(kind).get("cpus_per_gpu", self._defaults().get("cpus_per_gpu")))

    def memory_mb_per_gpu(self, kind: str | None) -> int | None:
        """The memory to ask for with one GPU of a type, in MB, if the file says so."""
        row = {**self._defaults(), **self._gpu(kind)}
        for key, factor in (("mem_gb_per_gpu", 1000), ("memory_gb_per_gpu", 1000), ("mem_mb_per_gpu", 1)):
            if _whole(row.get(key)):
                return int(row[key]) * factor
        return slurm.memory_mb(str(row.get("mem_per_gpu", "")))

    def _gpu(self, kind: str | None) -> dict:
        table = self.raw.get("gpu_types", self.raw.get("gpus", self.raw.get("gpu", {})))
        row = table.get(kind or "", {}) if isinstance(table, dict) else {}
        return row if isinstance(row, dict) else {}

    def _defaults(self) -> dict:
        row = self.raw.get("defaults", {})
        return row if isinstance(row, dict) else {}


def current_site(root: Path) -> Site:
    """The site file that fits: `$ENGAGING_SITE`, the cluster's own name, else generic."""
    asked = os.environ.get("ENGAGING_SITE")
    if asked:
        path = root / FOLDER / f"{asked}.toml"
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in (root / FOLDER).glob("*.toml")))
            raise UserError(f"ENGAGING_SITE={asked}: no {FOLDER}/{asked}.toml (there are: {known})")
        return read_site(path)
    cluster = cluster_name()
    for path in sorted((root / FOLDER).glob("*.toml")):
        site = read_site(path)
        names = site.raw.get("cluster_names", site.raw.get("clusters", []))
        if cluster and isinstance(names, list) and cluster in names:
            return site
    generic = root / FOLDER / "generic.toml"
    return read_site(generic) if generic.is_file() else Site("generic")


def read_site(path: Path) -> Site:
    """A site file, or UserError with the line that is wrong."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a site file: {error}") from None
    return Site(str(raw.get("name", path.stem)), path, raw)


def cluster_name() -> str:
    """ClusterName of slurm.conf, "" when SLURM is not here or does not answer."""
    if not slurm.available():
        return ""
    answer = slurm.ask(["scontrol", "show", "config"], timeout=10)
    for line in answer.out.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return ""


def default_cpus(site: Site, cluster: Cluster, partition: str, gpus: int, kind: str | None) -> int:
    """CPUs a node for `gpus` GPUs: the site's figure, never more than the GPUs' share of the smallest node.

    More than that share makes SLURM hold back, or bill, a GPU that cannot be used.
    """
    if not gpus:
        return 4
    shares = [
        node.cpus // max(sum(node.gpus.values()), 1)
        for node in cluster.nodes_of(partition)
        if node.gpus and (not kind or kind in node.gpus) and sum(node.gpus.values()) >= gpus
    ]
    share = min(shares, default=GENERIC_CPUS)
    return max(1, min(site.cpus_per_gpu(kind) or GENERIC_CPUS, share)) * gpus


def default_memory(site: Site, cluster: Cluster, partition: str, gpus: int, kind: str | None) -> int:
    """MB a node for `gpus` GPUs: the site's figure, never more than the GPUs' share of the smallest node."""
    shares = [
        node.memory_mb // max(sum(node.gpus.values()), 1)
        for node in cluster.nodes_of(partition)
        if node.gpus and (not kind or kind in node.gpus)
    ]
    share = min(shares, default=GENERIC_MEMORY_MB)
    if not gpus:
        return 16_000
    return max(1000, min(site.memory_mb_per_gpu(kind) or GENERIC_MEMORY_MB, share)) * gpus


def site_text(name: str, clusters_name: str, cluster: Cluster, today: date) -> str:
    """A site file for the cluster that answered: its partitions, its GPU types and their shares of a node."""
    # For what a login node hands on (`make quickstart`): where there are no GPUs, and the shortest limit.
    cpu = [p for p in cluster.partitions.values() if p.up and p.max_minutes and not cluster.gpu_types(p.name)]
    test = min(cpu, key=lambda p: p.max_minutes or 0, default=None)
    lines = [
        f"# {name}: asked of SLURM on {today}. Defaults only: every command asks the live cluster again.",
        f'name = "{name}"',
        f'as_of = "{today}"',
        f'cluster_names = ["{clusters_name or name}"]',
        *([f'test_partition = "{test.name}"'] if test else []),
        "",
        "[defaults]",
        f"cpus_per_gpu = {GENERIC_CPUS}",
        f"mem_gb_per_gpu = {GENERIC_MEMORY_MB // 1000}",
    ]
    for partition in cluster.partitions.values():
        kinds = ", ".join(f'"{kind}"' for kind in cluster.gpu_types(partition.name))
        limit = "" if partition.max_minutes is None else clock(partition.max_minutes)
        lines += [
            "",
            f"[partitions.{_key(partition.name)}]",
            f'max_time = "{limit}"',
            f"gpu_types = [{kinds}]",
        ]
        lines.append(f"preemptable = {str(partition.preemptable).lower()}")
        qos = cluster.qos.get(partition.qos or "")
        if qos and "gres/gpu" in qos.per_user:
            lines.append(f"gpus_per_user = {qos.per_user['gres/gpu']}")
    for kind in cluster.gpu_types():
        nodes = [node for node in cluster.nodes if kind in node.gpus]
        cpus = min(node.cpus // sum(node.gpus.values()) for node in nodes)
        memory = min(node.memory_mb // sum(node.gpus.values()) for node in nodes) // 1000
        lines += [
            "",
            f"[gpu_types.{_key(kind)}]",
            f"gpus_per_node = {max(node.gpus[kind] for node in nodes)}",
            f"cpus_per_gpu = {max(1, min(GENERIC_CPUS, cpus))}",
            f"mem_gb_per_gpu = {max(1, min(GENERIC_MEMORY_MB // 1000, memory))}",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """`engaging site`: which site file applies. `engaging site init [NAME]`: write one by asking SLURM."""
    parser = Parser("site", "Which cluster this is. `engaging site init` writes a site file by asking SLURM.")
    parser.add_argument("action", nargs="?", choices=["show", "init"], default="show")
    parser.add_argument("name", nargs="?", type=name_of("name"), help="init: the new site's name")
    parser.add_argument("--print", action="store_true", help="init: print the file, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="init: replace a file that is there")
    args = parser.read(argv)
    root = checkout()
    if args.action == "show":
        site = current_site(root)
        where = site.path.relative_to(root) if site.path else "built in"
        print(f"site {site.name} ({where}); cluster: {cluster_name() or 'no SLURM here'}")
        return 0
    slurm.need_slurm("engaging site init")
    name = args.name or cluster_name()
    name_of("name")(name)
    text = site_text(name, cluster_name(), ask_cluster(), date.today())
    if args.print:
        print(text, end="")
        return 0
    path = root / FOLDER / f"{name}.toml"
    if path.exists() and not args.overwrite:
        raise UserError(f"{path.relative_to(root)}: is there already; --overwrite replaces it, --print shows")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    print(f"written: {path.relative_to(root)}; read it, then: engaging plan gpt2 --gpus 1")
    if (first := current_site(root).path) not in (path, None):
        what = (
            "names this cluster too and comes first"
            if not os.environ.get("ENGAGING_SITE")
            else "is ENGAGING_SITE"
        )
        print(
            f"note: {first.relative_to(root)} {what}; export ENGAGING_SITE={name} takes yours",
            file=sys.stderr,
        )
    return 0


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else f'"{name}"'


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
