use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn rate(tokens: u64) -> NonZeroU64 {
    NonZeroU64::new(tokens).unwrap()
}

/// Pseudorandom numbers, which are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A number below 2ⁿ, where n is below `bits`: small numbers are as likely as large ones.
    fn of_any_size(&mut self, bits: u64) -> u64 {
        let bits = self.below(bits);
        self.below(1 << bits)
    }
}

#[test]
fn a_bucket_gives_what_it_holds_and_then_its_rate() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(50), 0, start);
    for _ in 0..5 {
        assert_eq!(bucket.not_before(start), None);
        bucket.charge(1);
    }
    let next = start + Duration::from_millis(20);
    assert_eq!(bucket.not_before(start), Some(next));
    assert_eq!(bucket.not_before(start + Duration::from_nanos(19_999_999)), Some(next));
    assert_eq!(bucket.not_before(next), None);
    bucket.charge(1);
    assert_eq!(bucket.not_before(next), Some(start + Duration::from_millis(40)));
}

#[test]
fn a_burst_comes_once() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(10), 100, start);
    bucket.charge(102);
    assert_eq!(bucket.not_before(start), Some(start + SECOND / 10));
    // However long nothing happens.
    let later = start + 1000 * SECOND;
    assert!(bucket.is_full(later));
    bucket.charge(2);
    assert_eq!(bucket.not_before(later), Some(later + SECOND / 10));
}

#[test]
fn an_unused_burst_does_not_grow() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(10), 100, start);
    let later = start + 1000 * SECOND;
    assert_eq!(bucket.not_before(later), None);
    bucket.charge(102);
    assert_eq!(bucket.not_before(later), Some(later + SECOND / 10));
}

#[test]
fn what_is_larger_than_the_bucket_goes_on_and_those_after_it_wait() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(1000), 0, start);
    bucket.charge(10_100);
    assert_eq!(bucket.not_before(start), Some(start + 10 * SECOND + SECOND / 1000));
    assert_eq!(bucket.not_before(start + 11 * SECOND), None);
}

#[test]
fn no_rate_and_no_cost_overflows() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(u64::MAX), u64::MAX, start);
    for _ in 0..10 {
        bucket.charge(u64::MAX);
    }
    assert!(bucket.not_before(start).is_some_and(|again| again <= start + 10 * SECOND));
    assert_eq!(bucket.not_before(start + Duration::from_secs(1 << 31)), None);

    let mut bucket = TokenBucket::new(rate(1), 0, start);
    bucket.charge(u64::MAX);
    assert_eq!(bucket.not_before(start), Some(start + LONGEST_WAIT));
    let later = start + Duration::from_secs(1 << 31);
    assert_eq!(bucket.not_before(later), Some(later + LONGEST_WAIT));
}

#[test]
fn a_time_before_the_last_one_adds_nothing() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(rate(10), 0, start);
    bucket.charge(2);
    let next = start + SECOND / 10;
    assert_eq!(bucket.not_before(next), None);
    bucket.charge(1);
    assert_eq!(bucket.not_before(start), Some(next + SECOND / 10));
    assert_eq!(bucket.not_before(next), Some(next + SECOND / 10));
}

#[test]
fn nothing_is_lost_however_often_the_bucket_is_asked() {
    let start = Instant::now();
    // A rate and steps that divide nothing evenly.
    let mut bucket = TokenBucket::new(rate(30), 0, start);
    bucket.charge(3);
    let mut given = 0;
    for step in 1..=1_000_000 {
        let now = start + step * Duration::from_nanos(9_999_991);
        if bucket.not_before(now).is_none() {
            bucket.charge(1);
            given += 1;
        }
    }
    // 30 in each of 9999.991 s.
    assert_eq!(given, 299_999);
}

/// Random loads on random buckets: what has been given is compared with what may be given, in every stretch of the run.
#[test]
fn a_bucket_gives_no_more_than_it_may_and_no_less_than_is_asked_of_it() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..300 {
        let (per_second, burst) = (1 + random.of_any_size(34), random.of_any_size(20));
        let most_cost = 1 + random.of_any_size(24);
        let start = Instant::now();
        let mut bucket = TokenBucket::new(rate(per_second), burst, start);
        let size = (u128::from(per_second) / 10).max(2);
        // In nanoseconds since the start.
        let mut now = 0u64;
        let mut events: Vec<(u64, u64)> = Vec::new();
        for _ in 0..100 {
            now += random.of_any_size(31);
            match bucket.not_before(start + Duration::from_nanos(now)) {
                None => {
                    let cost = random.below(most_cost);
                    bucket.charge(cost);
                    events.push((now, cost));
                }
                Some(again) => {
                    // It comes when it was said to come, and not earlier.
                    assert!(again > start + Duration::from_nanos(now));
                    let last = again.checked_sub(Duration::from_nanos(1)).unwrap();
                    assert!(bucket.not_before(last).is_some() || again == start + LONGEST_WAIT);
                    if random.below(2) == 0 && again < start + LONGEST_WAIT {
                        now = u64::try_from((again - start).as_nanos()).unwrap();
                        assert_eq!(bucket.not_before(again), None, "whoever waits is never starved");
                    }
                }
            }
        }
        for (index, &(from, _)) in events.iter().enumerate() {
            let mut sum = 0u128;
            for &(until, cost) in &events[index..] {
                // All but the last had to leave a token.
                let given = u128::from(until - from) * u128::from(per_second);
                let most = (size + u128::from(burst)) * 1_000_000_000 + given;
                assert!(
                    sum * 1_000_000_000 <= most,
                    "{sum} tokens at {per_second}/s from {from} to {until} ns"
                );
                sum += u128::from(cost);
            }
        }
    }
}

#[test]
fn an_operation_needs_a_token_of_each_bucket() {
    let start = Instant::now();
    let (operations, bytes) = (NonZeroU64::new(10), NonZeroU64::new(1000));
    let limit =
        RateLimit { operations_per_second: operations, bytes_per_second: bytes, ..RateLimit::default() };
    let mut limiter = RateLimiter::new(&limit, start).unwrap();
    for _ in 0..2 {
        assert_eq!(limiter.not_before(start), None);
        limiter.charge(0);
    }
    assert_eq!(limiter.not_before(start), Some(start + SECOND / 10));
    limiter.charge(1100);
    assert_eq!(limiter.not_before(start), Some(start + SECOND + SECOND / 1000));
    assert!(!limiter.is_full(start + SECOND));
    assert!(limiter.is_full(start + 2 * SECOND));
}

#[test]
fn without_a_limit_there_is_no_limiter() {
    let start = Instant::now();
    assert!(RateLimiter::new(&RateLimit::default(), start).is_none());
    let burst = RateLimit { operations_burst: Some(1), bytes_burst: Some(1), ..RateLimit::default() };
    assert!(RateLimiter::new(&burst, start).is_none());
    let only_bytes = RateLimit { bytes_per_second: NonZeroU64::new(1), ..RateLimit::default() };
    let mut limiter = RateLimiter::new(&only_bytes, start).unwrap();
    for _ in 0..1000 {
        limiter.charge(0);
    }
    assert_eq!(limiter.not_before(start), None);
}
