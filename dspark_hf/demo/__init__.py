"""The Gradio demo: one module a tab, the engine they share, and the app around them. Needs the extra `demo`."""
