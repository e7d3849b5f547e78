"""Every weight format in and out: file readers and writers, name tables and the engine that fills a model."""
