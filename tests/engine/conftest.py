"""These tests need vLLM, which brings an environment of its own: `make test-vllm`."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import engine_parts

    @pytest.fixture(scope="session")
    def models(tmp_path_factory):
        """Paths of a policy and of a length value model."""
        return engine_parts.policy_and_values(tmp_path_factory.mktemp("models"))

    @pytest.fixture(scope="module")
    def engine(models, request):
        """The one engine of a module, with the module's `SETTINGS`: a process has room for one at a time."""
        with engine_parts.an_engine(*models, **getattr(request.module, "SETTINGS", {})) as llm:
            yield llm
