def test_smoke(digits, tmp_path):
    import time
    t=time.time()
    s = digits.train(tmp_path / "a")
    print(time.time()-t, s.log)
    t=time.time()
    s = digits.train(tmp_path / "b", "finetune", f"init_from={tmp_path/'a'}")
    print(time.time()-t, s.log)
