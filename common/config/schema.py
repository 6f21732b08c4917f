"""Every key of a run's configuration, with its type, default and one-line meaning.

The sections follow the roles, so that the owner of a key is the process that reads it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config.algorithm import AlgorithmConfig, check_algorithm
from common.config.section import Section


class RunConfig(Section):
    """What this run is called and where it leaves its files."""

    name: str = Field("", description="Name of the run; empty: the name of the config file")
    root: str = Field("runs", description="Folder in which the run's own folder is made")
    seed: int = Field(0, description="Seed of prompt order, sampling and initial optimizer state")


class RewardConfig(Section):
    """How what was measured becomes a reward; null leaves the task's own value (docs/rewards.md)."""

    kind: Literal["tiers", "metric", "mixture"] | None = Field(
        None, description="A tier table, the metric itself (continuous), or a mixture of both"
    )
    metric: str | dict[str, float] | None = Field(
        None, description="Metric, or metrics with weights, or my_module:my_function"
    )
    metric_weight: float | None = Field(None, ge=0, le=1, description="Share of the continuous part in a mixture")
    scale: float | None = Field(None, description="Factor on the metric (`kind: metric` and `mixture`)")
    tiers: tuple[tuple[float, float], ...] | None = Field(
        None, description="(threshold, reward): falling thresholds of the metric, or rising ranks"
    )
    miss: float | None = Field(None, description="Reward beyond every tier")
    bad_query: float | None = Field(None, description="Reward of a query the engine refuses as wrong")
    format_bonus: float | None = Field(None, description="Added where the answer could be parsed")
    format_penalty: float | None = Field(None, description="Whole reward of a text without the right tags")
    json_penalty: float | None = Field(None, description="Whole reward of right tags around no usable answer")
    bonus_needs_gain: bool | None = Field(None, description="Add the bonus only where something was earned")
    costs: dict[str, dict[str, float | str]] = Field(
        {}, description="Metric -> {free, each, most, per: unit or doubling}: what too much of it costs"
    )


class TaskConfig(Section):
    """What the policy is asked to do and how it is judged."""

    name: str = Field("publication_search", description="Task family, or your own as my_module:MyTask")
    prompt: Literal["full", "short"] = Field("full", description="Instructions and request, or the bare request")
    reasoning: bool = Field(True, description="Answers carry a <think> part before the query")
    strict: bool = Field(True, description="Nothing but the tags and one key; false: as lenient as the original")
    metrics: tuple[str, ...] = Field((), description="More metrics: recall@10, f0.5, my_module:my_function")
    options: dict[str, Any] = Field({}, description="Options of the task, as dataset or retriever (docs/rewards.md)")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="Changes to the task's reward table")


class DataConfig(Section):
    """Where requests and their relevant documents come from."""

    corpus: str = Field(
        "demo",
        description="Folder of requests (BEIR, or rows/*.jsonl), or a generated world: demo, demo-sql, demo-evidence, "
        "demo-ranking, demo-trials; $VARIABLES are expanded",
    )
    train_split: str = Field("train", description="Judgments trained on: qrels/<split>.tsv")
    heldout_split: str = Field("test", description="Judgments never trained on")
    heldout_limit: PositiveInt | None = Field(None, description="Evaluate on the first so many held-out requests only")
    demo_seed: int = Field(0, description="Seed of the generated world")
    exclude: tuple[str, ...] = Field((), description="Ids of rows that are left out; unusable SQL rows are added")


class QuotaConfig(Section):
    """What the upstream allows: `requests` arrivals in any window of `window_s` seconds."""

    mode: Literal["strict", "adaptive"] = Field(
        "strict", description="strict: provably never more; adaptive: nearer to the limit, by the server's own headers"
    )
    off_peak: bool = Field(
        False, description="Send only at NCBI's hours for large jobs: weekends, 21:00-05:00 US Eastern on weekdays"
    )
    requests: PositiveInt = Field(10, description="Arrivals allowed in any window")
    window_s: PositiveFloat = Field(1.0, description="Length of the window in seconds")


class BreakerConfig(Section):
    """When an upstream that fails is left alone for a while."""

    failures: PositiveInt = Field(10, description="Failures in a row after which nothing is sent")
    pause_s: PositiveFloat = Field(5.0, description="Seconds without requests; then one tries whether it is back")


class CacheConfig(Section):
    """Search results kept beyond the process that asked for them."""

    mode: Literal["memory", "disk", "record", "replay"] = Field(
        "memory", description="disk: kept in folder, shared by the host; record, replay: a run's searches, all of them"
    )
    folder: str | None = Field(
        None, description="Where disk, record and replay keep results; null: searches/ in the run's folder"
    )
    share: bool | None = Field(
        None, description="Share results and searches in flight among all rewarders; null: where there is a quota"
    )
    share_mib: PositiveInt = Field(256, description="Most MiB of results the broker holds for sharing")
    disk_mib: PositiveInt = Field(1024, description="disk: most MiB kept; what was not used for longest goes first")
    max_age_h: PositiveFloat = Field(
        24.0, description="disk: hours after which a result counts as unknown where the engine's data has no version"
    )
    source: str | None = Field(
        None, description="What is searched, as part of every key; null: the engine's URL, or the local server's corpus"
    )


class Bm25Config(Section):
    """Lucene's BM25 (engine: bm25)."""

    k1: float = Field(0.9, ge=0, description="Saturation of term frequency")
    b: float = Field(0.4, ge=0, le=1, description="Length normalisation")
    syntax: Literal["words", "boolean"] = Field("words", description="Bag of words, or AND, OR, NOT and phrases")
    processes: PositiveInt = Field(1, description="JVMs")
    threads: PositiveInt = Field(1, description="Search threads per JVM")


class DenseConfig(Section):
    """Dense retrieval by faiss (engine: dense)."""

    encoder: str | None = Field(
        None, description="Hugging Face folder or hub id of the encoder; null: a small one made from the corpus"
    )
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None, description="How token vectors become one; null: what the encoder's folder says, else mean"
    )
    query_prefix: str = Field("", description="Put before every query, e.g. `query: `")
    passage_prefix: str = Field("", description="Put before every passage, e.g. `passage: `")
    normalize: bool | None = Field(
        None,
        description="Unit vectors, hence cosine; null: what the encoder's folder says, else true",
    )
    max_tokens: PositiveInt | None = Field(None, description="Longer texts are cut; null: what the model can take")
    index: Literal["flat", "hnsw"] = Field("flat", description="Exact, or approximate and faster from millions on")
    hnsw_m: int = Field(32, ge=2, le=256, description="HNSW: links per vector")
    hnsw_ef_construction: PositiveInt = Field(200, description="HNSW: candidates looked at to put a vector in")
    hnsw_ef_search: PositiveInt = Field(128, description="HNSW: candidates looked at to find one; at least k")
    gpu: bool = Field(False, description="Search on the GPU (faiss-gpu)")
    batch: PositiveInt = Field(64, description="Most queries encoded at once")
    threads: PositiveInt = Field(1, description="CPU threads of encoder and index")


class SqlConfig(Section):
    """Execution of SQL answers (engine: sqlite)."""

    processes: PositiveInt = Field(2, description="Jailed processes, hence queries at once, per rewarder")
    deadline_s: PositiveFloat = Field(30.0, description="Wall-clock seconds after which a query is stopped")


class SearchConfig(Section):
    """The search engine the rewarders ask."""

    engine: Literal["pubmed", "ctgov", "bm25", "dense", "sqlite"] = Field("pubmed", description="Kind of engine")
    url: str | None = Field(None, description="Base URL of the engine; null: start a local server over data.corpus")
    retmax: int | None = Field(
        None, ge=1, le=100_000, description="Ids asked for per query (PubMed gives at most 9,999); null: the task's own"
    )
    sort: Literal["relevance", "pub_date", "unsorted"] = Field(
        "pub_date", description="Order in which the engine cuts at retmax (unsorted: ctgov only)"
    )
    timeout_s: PositiveFloat = Field(20.0, description="Deadline of one request in seconds")
    max_connections: PositiveInt | None = Field(
        None,
        description="Requests in flight per rewarder; null: the engine's own (pubmed: no bound but the groups at hand, "
        "ctgov 16, bm25 and dense 4 of up to 64 queries); sqlite: search.sql.processes",
    )
    attempts: PositiveInt = Field(3, description="Tries of one query before it counts as unavailable")
    quota: QuotaConfig | None = Field(None, description="Fleet-wide quota; null: unlimited (own servers only)")
    breaker: BreakerConfig = Field(default_factory=BreakerConfig, description="Circuit breaker")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="Cache of results")
    bm25: Bm25Config = Field(default_factory=Bm25Config, description="Lucene")
    dense: DenseConfig = Field(default_factory=DenseConfig, description="faiss")
    sql: SqlConfig = Field(default_factory=SqlConfig, description="SQLite")
    api_key_env: str = Field("NCBI_API_KEY", description="Environment variable that holds the NCBI key")
    api_key_file: str | None = Field(
        None, description="File of mode 0600 that holds the NCBI key instead, on every rewarder's host"
    )
    more_api_keys_env: tuple[str, ...] = Field(
        (),
        description="Of further NCBI keys, where their owners may combine them; each has the quota to itself",
    )
    tool: str = Field("deepretrieval", description="`tool` parameter sent to NCBI")
    email: str | None = Field(None, description="`email` parameter sent to NCBI")
    latency_ms: float = Field(0.0, ge=0, description="Latency of the local server per request, milliseconds")
    port: int = Field(0, ge=0, le=65535, description="Port of the local server; 0: any free one")
    fault_rate: float = Field(0.0, ge=0, lt=1, description="Share of requests the local server fails, as NCBI does")


class WarmStartConfig(Section):
    """The small model that is built when no pretrained one is named."""

    layers: PositiveInt = Field(2, description="Decoder layers")
    width: PositiveInt = Field(128, description="Hidden size")
    heads: PositiveInt = Field(4, description="Attention heads")
    vocabulary: PositiveInt = Field(4096, description="Size of the byte-level BPE vocabulary")
    minutes: PositiveFloat = Field(
        3.0, description="Time limit of the supervised warm start in minutes; a model that it cuts short is warned of"
    )
    steps: PositiveInt | None = Field(None, description="Supervised steps; null: what fits the corpus")
    seed: int = Field(0, description="Seed of the initial weights and of the supervised batches")


class ModelConfig(Section):
    """The policy's initial weights."""

    path: str | None = Field(
        None, description="Hugging Face folder or hub id; null: build the small warm-started model"
    )
    warm_start: WarmStartConfig = Field(default_factory=WarmStartConfig, description="Used where path is null")


class SamplingConfig(Section):
    """How rollouts are drawn from the behaviour policy."""

    group_size: int = Field(8, ge=1, description="Samples per prompt")
    temperature: float = Field(1.0, gt=0, description="Softmax temperature of training rollouts")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass of training rollouts")
    max_tokens: PositiveInt = Field(512, description="Longest response in tokens")
    reproducible: bool | None = Field(
        None, description="Seeded samples that do not depend on their batch; null: where max_staleness is 0"
    )


class LoraConfig(Section):
    """Low-rank adapters: the learner trains these alone; what it publishes has them added in."""

    rank: PositiveInt = Field(32, description="Rank of the adapters")
    alpha: PositiveFloat = Field(64.0, description="They are scaled by alpha / rank")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Endings of module names, or all-linear: every linear layer but the output"
    )


class LearnerConfig(Section):
    """The learner: pace, optimizer, checkpoints."""

    steps: PositiveInt = Field(200, description="Policy updates of the run")
    groups_per_step: PositiveInt = Field(32, description="Groups trained on per update")
    max_staleness: int = Field(1, ge=0, description="Bound, in policy versions, of every trained token; 0: synchronous")
    lr: PositiveFloat = Field(1e-6, description="Learning rate of AdamW")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After warm-up")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    grad_clip: PositiveFloat = Field(1.0, description="Largest gradient norm")
    minibatches: PositiveInt = Field(1, description="Optimizer steps per policy update")
    micro_batch_tokens: PositiveInt = Field(16384, description="Input tokens per forward pass")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Compute type; weights stay float32")
    lora: LoraConfig | None = Field(None, description="Train adapters instead of all weights; null: all weights")
    activation_checkpointing: bool = Field(
        False, description="Compute decoder layers again in the backward pass instead of keeping what they made"
    )
    compile: bool = Field(False, description="torch.compile for each decoder layer; not worth it on a CPU")
    offload: Literal["none", "optimizer"] = Field(
        "none", description="optimizer: weights, gradients and moments rest in CPU memory and are updated there"
    )
    processes: PositiveInt = Field(1, description="Ranks, which share the model's weights and moments (FSDP2)")
    replicas: PositiveInt = Field(
        1, description="Copies of the model (HSDP); each is shared by processes / replicas ranks"
    )
    collective_timeout_s: PositiveFloat = Field(
        600.0, description="Seconds that ranks wait for one that does not move in a training step before all end"
    )
    threads: PositiveInt = Field(1, description="CPU threads per rank")
    checkpoint_every: PositiveInt = Field(50, description="Steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="Checkpoints kept")
    eval_every: int = Field(0, ge=0, description="Steps between held-out evaluations; 0: start and end only")

    @model_validator(mode="after")
    def _replicas_are_equal(self) -> LearnerConfig:
        if self.processes % self.replicas:
            raise ValueError(
                f"processes: {self.processes} cannot be {self.replicas} equal replicas: choose a multiple of replicas"
            )
        return self


class ActorConfig(Section):
    """Actors: engine and concurrency."""

    count: PositiveInt = Field(1, description="Actors started on this machine")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vLLM wherever it can be imported"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Weights and compute type of the engine")
    concurrent_groups: PositiveInt = Field(16, description="Groups in generation at a time per actor")
    max_model_len: PositiveInt = Field(1024, description="Longest prompt plus response in tokens")
    kv_cache_gib: PositiveFloat = Field(1.0, description="Memory for the KV cache on CPU in GiB")
    gpu_memory_share: float = Field(0.85, gt=0, le=1, description="Share of GPU memory for vLLM")
    threads: PositiveInt = Field(1, description="CPU threads of the engine")


class RewarderConfig(Section):
    """Rewarders: how many, and how much at a time."""

    count: PositiveInt = Field(1, description="Rewarders started on this machine")
    concurrent_groups: PositiveInt = Field(64, description="Groups in scoring at a time per rewarder")
    cache_entries: PositiveInt = Field(100_000, description="Search results kept in memory per rewarder")


class BrokerConfig(Section):
    """The broker: address, leases and bounds."""

    host: str = Field("127.0.0.1", description="Address the broker binds")
    port: int = Field(0, ge=0, le=65535, description="Port the broker binds; 0: any free one")
    lease_s: PositiveFloat = Field(60.0, description="Seconds without a heartbeat after which work is given to another")
    heartbeat_s: PositiveFloat = Field(1.0, description="Seconds between heartbeats")
    queue_items: PositiveInt = Field(100_000, description="Most groups held per stage")
    queue_mib: PositiveInt = Field(2048, description="Most MiB held per stage")
    max_frame_mib: PositiveInt = Field(64, description="Largest frame accepted in MiB")


class TrackingConfig(Section):
    """Where the figures go."""

    wandb: Literal["online", "offline", "off"] = Field("off", description="Weights & Biases; WANDB_MODE overrides")
    project: str = Field("deepretrieval", description="W&B project")
    entity: str | None = Field(None, description="W&B entity")
    samples_per_step: int = Field(4, ge=0, description="Trained samples written to samples.jsonl per step")


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig, description="Name, folder, seed")
    task: TaskConfig = Field(default_factory=TaskConfig, description="Task and reward")
    data: DataConfig = Field(default_factory=DataConfig, description="Requests and judgments")
    search: SearchConfig = Field(default_factory=SearchConfig, description="Search engine")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Initial policy")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="Rollouts")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig, description="Loss")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="Learner")
    actor: ActorConfig = Field(default_factory=ActorConfig, description="Actors")
    rewarder: RewarderConfig = Field(default_factory=RewarderConfig, description="Rewarders")
    broker: BrokerConfig = Field(default_factory=BrokerConfig, description="Broker")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Tracking")

    @model_validator(mode="after")
    def _algorithm_fits(self) -> Config:
        check_algorithm(self.algorithm, self.sampling.group_size, self.learner.steps)
        return self
