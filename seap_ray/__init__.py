"""seap_ray: task experts cut from a language model, calibrated and written on a Ray cluster.

The path of the data, one line a module (rings: arithmetic, models and files, Ray; each imports only what is below it):

    config        ray_config.yaml and overrides in, one frozen Config out
    methods       baselines by name, and the studies
    command       a job's arguments: help, a config, one line for an error
    tasks         what a task is, and the built-in ones
    moments       count, mean and squared deviations of a token stream; they add up
    scores        statistics and weight norms in, importance per column, head and channel out
    reconstruction  covariances and weights in, what the kept columns say of the cut ones out
    sparsity      how much each layer gives
    plan          which key-value groups, heads and channels stay, or which layers
    compact       a tensor and a plan in, the smaller tensor out
    architecture  the dimensions and weight names of a model family
    corpus        rows -> texts -> token ids
    recorder      hooks on a model -> moments of every site
    layerwise     the same of a model that is read one layer at a time
    records       moments on disk, whole or known to be damaged
    checkpoint    safetensors folders: read, fingerprint, write compacted
    hf            the Hugging Face classes that load a compacted checkpoint
    demo          a small model with six skills
    fitting       prompts of every task -> the router
    router        a prompt -> its task, or none, with a probability
    bucket        paths in S3 and Google Cloud Storage under pathlib's names
    storage       files that end whole, on a disk or in a bucket; a node's copies
    lock          one job at a time on a run
    run           the run directory: what is where
    progress      what a job says while it runs
    cluster       a driver's connection to Ray
    shards        corpora -> immutable token shards                         (Ray Data)
    placement     where a worker has the model, by what the nodes have
    calibrate     shards -> records -> statistics                           (Ray Data)
    planner       statistics -> plans                                       (Ray tasks)
    prune         plans -> checkpoints                                      (Ray tasks)
    quality       a model and a task's rows -> accuracy or perplexity
    harness       the same by lm-eval, on local files or from the hub
    speed         shapes -> tokens per second
    evaluation    models x tasks -> cells, cached and resumable             (Ray tasks)
    results       models and cells -> a results file
    table         a results file as text
    doctor        what the machines have against what a config needs        (Ray tasks)
    job           the main job: from a config to a table
    bench         specs at ratios -> judged models; what studies are made of
    benchmarks    ours and a baseline in turns -> tables; what jobs/bench.py measures
    studies       one question each: a calibrated run -> a table
    paper         the paper's tables, and ours beside them
    evidence      a run's files, read for its report
    pictures      numbers -> SVG
    anatomy       plans, scores and activations -> pictures
    findings      results and studies -> pictures and tables
    report        a run -> one page
    summary       runs -> text for a terminal
    vllm_plugin   names the compacted families to vLLM
    vllm_model    layers of unequal widths                                  (vLLM)
"""
