"""Context-dependent adapters, compared with static ones at equal budget."""
__version__ = "0.1.0"

# The short names, loaded on first use so that `import bem` costs nothing. The only hand-written lines of the package.
_where = {"attach": "adapters.base", "load": "adapters.base", "get_variant": "adapters.base", "list_variants": "adapters.base", "fit_budget": "adapters.base",
          "LoraConfig": "adapters.lora", "GeneratedConfig": "adapters.generated", "SpectralConfig": "adapters.spectral",
          "small_gpt": "host", "HostConfig": "host", "load_host": "hub", "HierarchicalController": "routing.controller", "RoutingLevel": "routing.controller",
          "RoutingState": "routing.controller", "SpectralGovernance": "adapters.governance", "CacheAwareBEMModule": "contracts", "load_corpus": "data", "load_record": "record",
          "BEMComponent": "contracts", "AdvancedBEMComponent": "contracts", "BEMConfig": "contracts", "ExperimentResult": "contracts", "run_experiment": "contracts",
          "BudgetConstraints": "contracts", "BudgetValidator": "contracts", "BudgetParityError": "contracts", "StatisticalValidationError": "contracts",
          "ComprehensiveEvaluator": "gates", "AcceptanceValidator": "gates", "StatisticalValidator": "gates", "ParetoAnalyzer": "pareto",
          "PTTrainer": "pt_training", "PTTrainingConfig": "pt_training",
          **dict.fromkeys(("HeadGroupGatingConfig", "HeadGroupGatingModule", "DynamicRankMaskConfig", "DynamicRankMaskModule", "DynamicRankMask", "KroneckerConfig",
                           "KroneckerModule", "FusedKroneckerOp", "ResidualFiLMConfig", "ResidualFiLMModule"), "names"),
          "get_tridiagonal_inverse_diagonal": "ops.resolvent", **dict.fromkeys(("BKCoreFunction", "QuantizedBKCore"), "resnet_bk.core"), **dict.fromkeys(("ResNetBKConfig", "MoEResNetBKLayer", "ResNetBKBlock"), "resnet_bk.block"),
          "AdaptiveResNetBKBlock": "resnet_bk.depth", "MultiScaleResNetBKBlock": "resnet_bk.scale", **dict.fromkeys(("ResNetBK", "ResNetBKEncoder"), "resnet_bk.model"),
          **dict.fromkeys(("ConfigurableResNetBK", "BKSystemConfig", "BASELINE_CONFIG", "STEP2_CONFIG", "STEP2_FULL_CONFIG", "STEP4_CONFIG", "STEP5_CONFIG", "STEP6_CONFIG", "FULL_CONFIG"), "resnet_bk.presets"),
          **dict.fromkeys(("accelerate", "join", "plain"), "acceleration"), "use_backend": "cuda.launch", "sparse_generated_update": "ops.sparse", "adaptive_routing_level": "routing.policy", "quantize_bem_parameters": "adapters.quantized",
          **dict.fromkeys(("BEMProfiler", "PerformanceTracker", "PerformanceProfiler"), "cost.profiler"), "BEMDebugger": "debugger", **dict.fromkeys(("MemoryOptimizer", "CodeTensorPool"), "memory_pool"), "Telemetry": "telemetry", **dict.fromkeys(("CircuitBreaker", "SafetyMonitor", "Resilient"), "resilience"), "split_on_oom": "fallbacks",
          "NumericalStabilityMonitor": "stability", **dict.fromkeys(("TrainingMetrics", "Trainer", "TrainerConfig"), "trainer"), "CPUOffloadedOptimizer": "offload",
          **dict.fromkeys(("FLOPsCounter", "TimingBenchmark", "MemoryProfiler"), "benchmarks"), **dict.fromkeys(("ComprehensiveBenchmark", "BenchmarkResults"), "comprehensive"), "empirical_reduction": "reduction"}

def __getattr__(name):
    from importlib import import_module
    if name in _where: return getattr(import_module(f"bem.{_where[name]}"), name)
    try: return import_module(f"bem.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"bem.{name}": raise
        raise AttributeError(f"bem has no attribute '{name}'; the short names are {', '.join(_where)}.") from None

def __dir__(): return [*globals(), *_where]
