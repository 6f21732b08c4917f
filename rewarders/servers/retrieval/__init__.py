"""The local retrieval server: BM25 (Lucene) or dense (faiss) over a BEIR folder, for every rewarder of a host."""
