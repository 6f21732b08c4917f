"""Every data set of the original: what it is for, how large it is, whose it is, and where it comes from.

Names are those of the folders in configs/original. Row counts of the original's files; `measured` was counted in the
files themselves, `published` stands in the paper or on the set's own pages, `estimated` is neither. BEIR sets are
counted here as requests with judgments, as we use them; the original counts pairs in SciFact and FiQA.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from common.tasks.outcome import EngineKind

Basis = Literal["measured", "published", "estimated"]
Layout = Literal["beir", "questions", "reviews", "sql", "original", "passages", "merged"]
SourceKind = Literal["hub", "http", "by_hand"]


class Count(msgspec.Struct, frozen=True):
    """rows: of a split."""

    rows: int
    basis: Basis


class Source(msgspec.Struct, frozen=True):
    """Where files come from.

    address: repository id of a hub data set, URL of a file, or of the page where a person gets it. files: of a hub
    repository, as glob patterns. folder: below the raw folder, where the files go. md5: published checksum of the file.
    extra: not needed, fetched only when asked for. note: what a person has to do, or what the files are.
    """

    kind: SourceKind
    address: str
    files: tuple[str, ...] = ()
    folder: str = ""
    md5: str = ""
    extra: bool = False
    note: str = ""


class Dataset(msgspec.Struct, frozen=True):
    """One data set.

    task: whose rows it holds, "" for a corpus alone. variant: value of `task.options.dataset`. layout: how its raw
    files look. roles: what parts of its raw files stand for here, where that is not what they are called. documents: of
    its corpus; corpus_of: the set whose corpus it shares. disk_gb: raw files, unpacked, about. mirrors: other places
    with the same files.
    """

    name: str
    task: str
    engines: tuple[EngineKind, ...]
    layout: Layout
    splits: dict[str, Count]
    licence: str
    disk_gb: float
    sources: tuple[Source, ...]
    variant: str = ""
    roles: dict[str, str] = {}
    documents: int = 0
    corpus_of: str = ""
    mirrors: tuple[Source, ...] = ()
    parts: tuple[str, ...] = ()


ORIGINAL_HUB: Final = "DeepRetrieval/datasets"
_BEIR_HOST: Final = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
_DPR_HOST: Final = "https://dl.fbaipublicfiles.com/dpr"
_BIRD_HOST: Final = "https://bird-bench.oss-cn-beijing.aliyuncs.com"


def _measured(**rows: int) -> dict[str, Count]:
    return {split: Count(number, "measured") for split, number in rows.items()}


def _published(**rows: int) -> dict[str, Count]:
    return {split: Count(number, "published") for split, number in rows.items()}


def _estimated(**rows: int) -> dict[str, Count]:
    return {split: Count(number, "estimated") for split, number in rows.items()}


def _original(category: str, folder: str, extra: bool = False) -> Source:
    note = "the original's rows with its own prompts"
    return Source("hub", ORIGINAL_HUB, (f"{category}/{folder}/*",), extra=extra, note=note)


def _reviews(name: str, engine: EngineKind, task: str, splits: dict[str, Count]) -> Dataset:
    raw = Source("hub", ORIGINAL_HUB, (f"raw_data/{name}/*.jsonl",), note="LEADS' reviews")
    return Dataset(
        name, task, (engine,), "reviews", splits, "rows MIT (DeepRetrieval); LEADS: see arXiv 2501.16255", 0.1,
        (raw, _original("search_engine", name, extra=True)), roles={"val": "test"},
    )  # fmt: skip


def _questions(
    name: str, splits: dict[str, Count], licence: str, files: tuple[str, ...], folder: str, roles: dict[str, str]
) -> Dataset:
    sources = tuple(Source("http", f"{_DPR_HOST}/data/retriever/{file}") for file in files)
    return Dataset(
        name, "evidence_seeking", ("bm25", "dense"), "questions", splits, licence, 0.1,
        (*sources, _original("local_index_search", folder, extra=True)), variant=name, roles=roles,
        documents=21_015_324, corpus_of="wikipedia",
    )  # fmt: skip


def _beir(
    name: str, md5: str, splits: dict[str, Count], licence: str, documents: int, disk_gb: float, variant: str = ""
) -> Dataset:
    variant = variant or name
    archive = Source("http", f"{_BEIR_HOST}/{name}.zip", md5=md5)
    mirrors = (
        Source("hub", f"BeIR/{name}", ("*.jsonl.gz",)),
        Source("hub", f"BeIR/{name}-qrels", ("*.tsv",), folder="qrels"),
    )
    return Dataset(
        name, "ranking", ("bm25",) if name == "fiqa" else ("bm25", "dense"), "beir", splits, licence, disk_gb,
        (archive, _original("local_index_search", variant, extra=True)), variant=variant, documents=documents,
        mirrors=mirrors,
    )  # fmt: skip


def _cluster(name: str, train: int, test: int) -> Dataset:
    return Dataset(
        name, "ranking", ("bm25", "dense"), "original", _measured(train=train, test=test),
        "MS MARCO: non-commercial research", 0.1, (_original("local_index_search", name),), variant=name,
        # Whether its 101 validation rows were cut from train is not known: they are left out.
        roles={"val": ""}, documents=8_841_823, corpus_of="msmarco",
    )  # fmt: skip


_ALL: Final = (
    _reviews("pubmed", "pubmed", "publication_search",
             _estimated(train=12_600, dev=4_217) | _measured(test=4_217)),
    _reviews("ctgov", "ctgov", "trial_search", _measured(train=5_074, dev=1_692, test=1_692)),
    _questions(
        "nq", _published(train=79_168) | _measured(dev=8_757, test=3_610), "CC BY-SA 3.0",
        ("nq-train.qa.csv", "nq-dev.qa.csv", "nq-test.qa.csv"), "nq_serini", {},
    ),
    _questions(
        "triviaqa", _published(train=78_785, test=11_313) | _measured(dev=8_837), "Apache-2.0",
        ("trivia-train.qa.csv.gz", "trivia-dev.qa.csv.gz", "trivia-test.qa.csv.gz"), "triviaqa", {},
    ),
    _questions(
        "squad", _published(train=78_713, dev=8_886) | _measured(test=10_570), "CC BY-SA 4.0",
        ("biencoder-squad1-train.json.gz", "biencoder-squad1-dev.json.gz", "squad1-test.qa.csv"), "squad",
        {"val": "test"},  # the original cut its 201 validation rows from test
    ),
    _beir("scifact", "5f7d1de60b170fc8027bb7898e2efca1", _measured(train=809, test=300),
          "claims CC BY 4.0, abstracts ODC-By 1.0", 5_183, 0.02),
    _beir("nfcorpus", "a89dba18a62ef92f7d323ec890a0d38d", _measured(train=2_590, dev=324, test=323),
          "academic use; BEIR's copy CC BY-SA 4.0", 3_633, 0.02),
    _beir("fever", "5a818580227bfb4b35bb6fa46d9b6c03", _published(train=109_810) | _measured(dev=6_666, test=6_666),
          "CC BY-SA 3.0", 5_416_568, 9.0),
    _beir("hotpotqa", "f412724f78b0d91183a0e86805e16114", _published(train=85_000, dev=5_447) | _measured(test=7_405),
          "CC BY-SA 4.0", 5_233_329, 2.5),
    _beir("msmarco", "444067daf65d982533ea17ebd59501e4", _published(train=502_939, dev=6_980) | _measured(test=43),
          "non-commercial research", 8_841_823, 4.5, variant="msmarco_beir"),
    _cluster("msmarco_health", 19_755, 2_034),
    _cluster("msmarco_science", 22_416, 2_305),
    _cluster("msmarco_tech", 10_974, 1_291),
    _beir("fiqa", "17918ed23cd04fb15047f73e6c3bd9d9", _published(train=5_500, dev=500, test=648),
          "not stated; research use", 57_638, 0.1),
    Dataset(
        "bird", "text_to_sql", ("sqlite",), "sql", _published(train=9_428) | _measured(test=1_534), "CC BY-SA 4.0",
        50.0,
        (Source("http", f"{_BIRD_HOST}/train.zip"), Source("http", f"{_BIRD_HOST}/dev.zip"),
         _original("sql", "bird", extra=True)),
        variant="bird", roles={"dev": "test", "val": "test"},  # its official dev is everyone's test
    ),
    Dataset(
        "spider", "text_to_sql", ("sqlite",), "sql", _published(train=8_659) | _measured(dev=1_034, test=2_147),
        "CC BY-SA 4.0", 1.0,
        (Source("by_hand", "https://yale-lily.github.io/spider",
                note="get spider_data.zip from the page (it lies on Google Drive) and unpack it into the raw folder"),
         _original("sql", "spider", extra=True)),
        variant="spider",
    ),
    Dataset(
        "sql_all", "text_to_sql", ("sqlite",), "merged", _published(train=18_087) | _measured(test=3_681),
        "CC BY-SA 4.0", 0.0, (), variant="bird", parts=("bird", "spider"),
    ),
    Dataset(
        "wikisql", "text_to_sql", ("sqlite",), "original", _published(train=56_355), "BSD-3-Clause", 0.2,
        (_original("sql", "wikisql"),), variant="spider", roles={"val": "dev"},
    ),
    Dataset(
        "wikipedia", "", ("bm25", "dense"), "passages", {}, "CC BY-SA 3.0", 14.0,
        (Source("http", f"{_DPR_HOST}/wikipedia_split/psgs_w100.tsv.gz", note="DPR's passages of 100 words"),),
        documents=21_015_324,
    ),
)  # fmt: skip

DATASETS: Final[dict[str, Dataset]] = {dataset.name: dataset for dataset in _ALL}
