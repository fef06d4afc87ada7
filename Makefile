# Every target only calls ./dev, which says what each does: ./dev help
.PHONY: demo test lint sanitize gpu-check smoke-other-torch
demo test lint sanitize gpu-check smoke-other-torch:
	@./dev $@
