"""seap_ray: task experts cut from a language model, calibrated and written on a Ray cluster.

The path of the data, one line a module (rings: arithmetic, models and files, Ray; each imports only what is below it):

    config        ray_config.yaml and overrides in, one frozen Config out
    command       a job's arguments: help, a config, one line for an error
    tasks         what a task is, and the built-in ones
    moments       count, mean and squared deviations of a token stream; they add up
    scores        statistics and weight norms in, importance per column, head and channel out
    sparsity      how much each layer gives
    plan          which key-value groups, heads and channels stay
    compact       a tensor and a plan in, the smaller tensor out
    architecture  the dimensions and weight names of a model family
    corpus        rows -> texts -> token ids
    recorder      hooks on a model -> moments of every site
    records       moments on disk, whole or known to be damaged
    checkpoint    safetensors folders: read, fingerprint, write compacted
    hf            the Hugging Face classes that load a compacted checkpoint
    demo          a small model with six skills
    fitting       prompts of every task -> the router
    router        a prompt -> its task, or none, with a probability
    run           the run directory: what is where, what is whole
    cluster       a driver's connection to Ray
    shards        corpora -> immutable token shards                         (Ray Data)
    calibrate     shards -> records -> statistics                           (Ray Data)
    prune         statistics -> plans -> checkpoints                        (Ray tasks)
    quality       accuracy and perplexity of a checkpoint on every task     (Ray tasks)
    report        progress while it runs, the table at its end
    job           the whole path, from a config to a table
    vllm_plugin   names the compacted families to vLLM
    vllm_model    layers of unequal widths                                  (vLLM)
"""
