"""Reading and making the folders of documents, requests and judgments that everything else works on."""
