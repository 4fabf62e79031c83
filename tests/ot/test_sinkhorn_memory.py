from helpers.process import output


def test_points_take_no_memory_of_the_size_of_the_plan():
    # A matrix of the costs would take 1.6 GB.
    script = """
        import resource, torch, warnings
        from shiftkern import ConvergenceWarning, set_num_threads
        from shiftkern.ot import sinkhorn_samples

        warnings.simplefilter("ignore", ConvergenceWarning)
        set_num_threads(2)

        def solve(n):
            X = torch.randn(n, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            Y = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
            sinkhorn_samples(X, Y, 1.0, max_iter=2).value.backward()
            assert X.grad.isfinite().all()

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        solve(500)
        before = peak()
        solve(20000)
        print(peak() - before)
    """
    assert float(output(script, deadline=100)) < 50.0
