# Every target only calls ./dev, which says what each does: ./dev help
.PHONY: demo test lint docs sanitize gpu-check test-other-torch
demo test lint docs sanitize gpu-check test-other-torch:
	@./dev $@
